"""When deltas go to an ingress replica, and that nothing is lost, repeated or reordered on the way."""

from __future__ import annotations

import pytest

from isotherm.actors.attention.outbox import FEW_STREAMS, FLUSH, LONGEST_FLUSH, Outbox, flush_interval, merged_deltas
from isotherm.cluster.messages.requests import Delta, FinishReason, PromptLogprobs, TokenLogprobs


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


def test_merged_deltas_say_the_same():
    p, q = TokenLogprobs(-1.0), TokenLogprobs(-2.0)
    steps = [
        Delta("a", 0, (5,), logprobs=(p,), cached_tokens=3), Delta("b", 4, (9,)),
        Delta("a", 1, (6, 7), logprobs=(q, p)), Delta("b", 5, (), FinishReason.STOP),
        Delta("a", 3, (8,), FinishReason.LENGTH, (q,)),
    ]  # fmt: skip
    assert merged_deltas(steps) == [
        Delta("a", 0, (5, 6, 7, 8), FinishReason.LENGTH, (p, q, p, q), cached_tokens=3),
        Delta("b", 4, (9,), FinishReason.STOP)
    ]  # fmt: skip


def test_what_scores_a_prompt_comes_in_one_with_the_first_tokens():
    p, q = TokenLogprobs(-1.0, rank=1), TokenLogprobs(-2.0, rank=3)
    steps = [
        Delta("a", 0, prompt=PromptLogprobs(1, (p, q))), Delta("b", 0, (5,)),
        Delta("a", 0, prompt=PromptLogprobs(3, (q,))),
        Delta("a", 0, (9,), prompt=PromptLogprobs(4, (p,))), Delta("a", 1, (9,), FinishReason.LENGTH),
    ]  # fmt: skip
    assert merged_deltas(steps) == [
        Delta("a", 0, (9, 9), FinishReason.LENGTH, prompt=PromptLogprobs(1, (p, q, q, p))),
        Delta("b", 0, (5,)),
    ]


@pytest.mark.parametrize("after", [
    Delta("a", 0, finish_reason=FinishReason.MOVED), Delta("a", 1, finish_reason=FinishReason.ERROR, error="lost"),
    Delta("a", 2, (7,)), Delta("b", 1, (7,)),
])  # fmt: skip
def test_what_does_not_follow_stays_apart(after: Delta):
    assert merged_deltas([Delta("a", 0, (5,)), after]) == [Delta("a", 0, (5,)), after]
    # A later request of that name
    assert merged_deltas([Delta("a", 0, (5,), FinishReason.STOP), Delta("a", 1, (6,))])[1:] == [Delta("a", 1, (6,))]
