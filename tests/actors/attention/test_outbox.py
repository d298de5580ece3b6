"""When deltas go to an ingress replica, and that nothing is lost, repeated or reordered on the way."""

from __future__ import annotations

import pytest

from isotherm.actors.attention.outbox import FEW_STREAMS, FLUSH, LONGEST_FLUSH, Outbox, flush_interval
from isotherm.cluster.messages.requests import Delta, FinishReason


def tokens(stream: int, start: int, count: int = 1, finish: FinishReason | None = None) -> Delta:
    return Delta(f"request-{stream}", start, tuple(range(start, start + count)), finish)


def test_few_streams_wait_for_ten_milliseconds_and_many_for_no_more_than_forty():
    assert [flush_interval(streams) for streams in (1, FEW_STREAMS, 2 * FEW_STREAMS, 1000)] == [
        FLUSH,
        FLUSH,
        2 * FLUSH,
        LONGEST_FLUSH,
    ]
    assert (FLUSH, LONGEST_FLUSH) == (0.01, 0.04)


def test_what_comes_after_a_pause_goes_at_once():
    outbox = Outbox()
    for now in (0.0, 0.05, 0.1):
        outbox.put([tokens(0, int(100 * now) + 1)])
        assert len(outbox.due(now)) == 1
        assert outbox.due(now) == []


@pytest.mark.parametrize("streams", [1, 16])
def test_fast_steps_come_joined_one_delta_per_stream(streams: int):
    outbox, lists = Outbox(), 0
    received: dict[str, list[int]] = {f"request-{s}": [] for s in range(streams)}
    for step in range(400):  # of a millisecond each, looked at every ten
        outbox.put([tokens(s, step, finish=FinishReason.LENGTH if step == 399 else None) for s in range(streams)])
        if step % 10 == 9 and (deltas := outbox.due(step / 1000)):
            lists += 1
            assert [d.request_id for d in deltas] == list(received)
            for delta in deltas:
                assert delta.start == len(received[delta.request_id])
                received[delta.request_id] += delta.token_ids
    assert lists == (40 if streams == 1 else 11)
    assert set(map(tuple, received.values())) == {tuple(range(400))}


@pytest.mark.parametrize(
    "urgent",
    [tokens(16, 0), tokens(3, 5, finish=FinishReason.STOP), Delta("request-3", 0, finish_reason=FinishReason.MOVED)],
)
def test_first_and_last_tokens_take_the_others_along(urgent: Delta):
    outbox = Outbox()
    outbox.put([tokens(s, 4) for s in range(16)])
    assert len(outbox.due(1.0)) == 16
    outbox.put([tokens(s, 5) for s in range(16) if f"request-{s}" != urgent.request_id])
    assert outbox.due(1.0 + FLUSH) == []
    outbox.put([urgent])
    assert outbox.due(1.0 + FLUSH / 2) == []
    assert urgent in outbox.due(1.0 + FLUSH)
    outbox.put([tokens(s, 6) for s in range(16)])
    assert outbox.due(1.0 + 2 * FLUSH) == []
    assert len(outbox) == 16
