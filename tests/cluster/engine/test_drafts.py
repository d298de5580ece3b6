"""Which chunks have drafts, and room for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from drafters import Guesser, always

from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.draft_lengths import PROBE_FIRST, PROBE_STEPS, DraftLengths
from isotherm.cluster.engine.scheduler import Scheduler
from isotherm.cluster.engine.sequence import Chunk, Sampled, ScheduledSequence
from isotherm.cluster.engine.speculation import FRUITLESS, PAUSE, TIMED_EVERY, Speculation
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, SamplingParams

CONFIG = SchedulerConfig(block_size=4, blocks=8, max_batch_tokens=12, max_sequences=4, max_model_len=32)


class Sevens(Guesser):
    def guess(self, sequence: ScheduledSequence, most: int) -> list[int]:
        return [7] * most


def request(name: str, prompt: int = 3, max_tokens: int = 20, **params) -> GenerationRequest:
    return GenerationRequest(name, tuple(range(prompt)), SamplingParams(max_tokens, **params))


def engine(*requests: GenerationRequest, **config) -> tuple[Scheduler, Speculation]:
    scheduler = Scheduler(replace(CONFIG, **config))
    for one in requests:
        scheduler.add(one)
    return scheduler, always(Sevens(), 4)


def step(scheduler: Scheduler, speculation: Speculation, tokens: int = 7) -> tuple[list[Chunk], list[Delta]]:
    config = scheduler.config
    chunks = scheduler.schedule()
    chunks = speculation.extended(chunks, scheduler.blocks, config.max_batch_tokens, config.max_model_len)
    for chunk in chunks:
        assert len(chunk.sequence.blocks) * config.block_size >= chunk.start + chunk.count
    deltas = scheduler.complete(chunks, [Sampled(tokens)] * sum(chunk.samples for chunk in chunks))
    speculation.completed(chunks)
    return list(chunks), deltas


def test_right_drafts_come_together_and_are_counted():
    scheduler, speculation = engine(request("a"))
    chunks, _ = step(scheduler, speculation)
    assert not chunks[0].draft, "a prompt's first token is not guessed"
    chunks, (delta,) = step(scheduler, speculation)
    assert chunks[0].draft == (7, 7, 7, 7) and delta.token_ids == (7,) * 5
    assert (delta.drafts_accepted, delta.drafts_rejected) == (4, 0)
    chunks, (delta,) = step(scheduler, speculation, tokens=8)
    assert delta.token_ids == (8,) and (delta.drafts_accepted, delta.drafts_rejected) == (0, 4)
    meter = speculation.meter()
    assert (meter.drafted, meter.tried, meter.accepted, meter.steps) == (8, (2, 1, 1, 1), (1, 1, 1, 1), 2)


def test_a_stop_token_among_drafts_ends_the_stream_there():
    """And its guess was right."""
    scheduler, speculation = engine(request("a", stop_token_ids=(7,)), request("b"))
    step(scheduler, speculation, tokens=6)
    _, deltas = step(scheduler, speculation)
    by_id = {delta.request_id: delta for delta in deltas}
    assert by_id["a"].token_ids == (7,) and by_id["a"].finish_reason is FinishReason.STOP
    assert (by_id["a"].drafts_accepted, by_id["a"].drafts_rejected) == (1, 3)
    assert by_id["b"].finish_reason is None and len(by_id["b"].token_ids) > 1
    meter = speculation.meter()
    assert (meter.drafted, meter.tried, meter.accepted) == (8, (2, 1, 1, 1), (2, 1, 1, 1))


@pytest.mark.parametrize(
    ("asked", "config", "drafts"),
    [
        ({"max_tokens": 4}, {}, 2),  # of four tokens one is there, and one comes with the drafts
        ({"max_tokens": 2}, {}, 0),
        ({"prompt": 28}, {"max_batch_tokens": 32}, 2),  # of the model's 32 tokens
        ({}, {"max_batch_tokens": 3}, 2),
        ({"speculate": False}, {}, 0),
        ({"prompt": 6}, {"blocks": 2, "max_model_len": 8, "max_batch_tokens": 12}, 0),
        ({"prompt": 5}, {"blocks": 2, "max_model_len": 8, "max_batch_tokens": 12}, 1),
    ],
)
def test_there_are_as_many_as_there_is_room_for(asked: dict, config: dict, drafts: int):
    scheduler, speculation = engine(request("a", **asked), **config)
    step(scheduler, speculation)
    chunks, _ = step(scheduler, speculation)
    assert len(chunks[0].draft) == drafts


def test_what_one_stream_gets_another_cannot_have():
    """Neither tokens of the step nor blocks; and no one gives way for drafts."""
    scheduler, speculation = engine(request("a"), request("b"), request("c"), max_batch_tokens=9)
    step(scheduler, speculation)
    chunks, _ = step(scheduler, speculation)
    assert [len(chunk.draft) for chunk in chunks] == [4, 2, 0]
    scheduler, speculation = engine(request("a", 4, 4), request("b", 4, 4), blocks=4, max_model_len=16)
    step(scheduler, speculation)
    for _ in range(3):
        step(scheduler, speculation, tokens=9)
    assert scheduler.preemptions == 0


def test_nobody_gives_way_for_guesses_that_were_wrong():
    """Their blocks are there again in the next step."""
    asked = request("a", 2), request("b", 3, 3)
    scheduler, speculation = engine(*asked, blocks=3, max_model_len=12)
    drafted, ended = 0, []
    while len(scheduler):
        chunks, deltas = step(scheduler, speculation, tokens=9)
        drafted += sum(len(chunk.draft) for chunk in chunks)
        ended += [delta.request_id for delta in deltas if delta.finish_reason is not None]
    assert drafted > 0 and ended == ["b", "a"] and scheduler.preemptions == 0


def test_between_steps_a_stream_has_the_blocks_that_it_would_have_without_guesses():
    for tokens in (7, 9):
        scheduler, speculation = engine(request("a"))
        for _ in range(4):
            step(scheduler, speculation, tokens)
            (sequence,) = scheduler.running
            assert len(sequence.blocks) == -(-sequence.computed // CONFIG.block_size)


def test_blocks_of_guesses_that_could_not_be_made_are_given_back():
    scheduler, speculation = engine(request("a"))
    step(scheduler, speculation)
    speculation.drafter.draft = lambda asked: [[] for _ in asked]  # type: ignore[method-assign]
    step(scheduler, speculation)
    assert scheduler.blocks.used == 1


def test_a_pause_has_an_end_and_the_next_one_in_a_row_is_longer():
    scheduler, speculation = engine(request("a"))
    assert speculation.pause("lost") == PAUSE and speculation.meter().why == "lost" and not speculation.is_over
    drafts = []
    for _ in range(PAUSE):
        speculation.extended((), scheduler.blocks, 12, 32)
        drafts.append(not speculation.stopped)
    assert drafts == [False] * (PAUSE - 1) + [True]
    assert speculation.pause("lost") == 2 * PAUSE
    speculation.stop("broken")
    assert speculation.is_over


def test_a_pause_after_drafts_that_came_is_as_long_as_the_first():
    scheduler, speculation = engine(request("a"))
    speculation.pause("lost")
    for _ in range(PAUSE):
        speculation.extended((), scheduler.blocks, 12, 32)
    for _ in range(2):
        chunks, _ = step(scheduler, speculation)
    assert chunks[0].draft and speculation.pause("lost") == PAUSE


def test_counts_of_tokens_are_within_bounds():
    with pytest.raises(ValueError, match="drafts have 9 tokens; it must be 1 to 8"):
        Speculation(Sevens(), 9)


def test_a_drafter_is_told_of_steps_as_long_before_drafts_as_it_looks_back():
    """And not of those before: with many streams, what it keeps of each shows in every step."""
    drafter, lengths = Guesser(), DraftLengths(0, 0, has_passes=False)
    drafter.looks_back = 3
    speculation = Speculation(drafter, 2, lengths)
    assert speculation.listens
    lengths._idle = 1  # drafts have stopped paying
    listened = []
    while not lengths._probing:
        listened.append(speculation.listens)
        lengths.skips_step()
    assert listened == [False] * (PROBE_FIRST - 4) + [True] * 3 and speculation.listens
    assert speculation.pause("lost") == PAUSE and not speculation.listens
    speculation._paused = 3
    assert speculation.listens
    speculation.stop("lost for good")
    assert not speculation.listens


@pytest.mark.parametrize("looks_back", [0, 3, 2 * TIMED_EVERY, 8 * TIMED_EVERY])
def test_of_steps_that_are_due_no_drafts_few_are_timed(looks_back: int, monkeypatch: pytest.MonkeyPatch):
    """Timing takes time itself, which shows with many streams; calls that do nothing show with one. Steps that the
    drafter is told of, and that drafts are asked for, are passed over by none; the latter are timed all."""
    scheduler, (one,) = Scheduler(CONFIG), [request("a", max_tokens=1000)]
    scheduler.add(one)
    chunks = scheduler.schedule()
    scheduler.complete(chunks, [Sampled(7)])
    chunks = scheduler.schedule()
    lengths, drafter, timed, out, told = DraftLengths(0, 0, has_passes=False), Guesser(), [], [], []
    drafter.looks_back = looks_back
    speculation = Speculation(drafter, 2, lengths)
    monkeypatch.setattr(lengths, "took", lambda rows, seconds, steps: timed.append(steps))
    lengths._idle, lengths._probe_after = 1, 4 * TIMED_EVERY  # drafts have stopped paying

    def steps(count: int) -> None:
        for _ in range(count):
            out.append(speculation.sits_out())
            if not out[-1]:
                speculation.extended(chunks, scheduler.blocks, 12, 32)
                speculation.completed(chunks)
            told.append(speculation.listens)

    idle = 4 * TIMED_EVERY - 2
    steps(idle)
    listened = min(idle, looks_back)
    quiet = idle - listened
    timed_quiet = -(-quiet // TIMED_EVERY)
    assert not lengths._probing and len(timed) == timed_quiet + listened // TIMED_EVERY
    assert told == [False] * quiet + [True] * listened
    assert sum(out) == quiet - timed_quiet and not any(out[quiet:])
    assert sum(timed) == len(timed) + sum(out)  # those that are passed over age what was measured
    timed.clear()
    steps(PROBE_STEPS)
    assert lengths._probing and timed == [1] * PROBE_STEPS and not any(out[idle:]) and all(told[idle:])


def test_it_has_no_part_in_steps_once_it_is_stopped():
    _, speculation = engine(request("a"))
    assert not speculation.sits_out()
    speculation.pause("lost")
    assert not speculation.sits_out()
    speculation.stop("broken")
    assert speculation.sits_out() and not speculation.listens


def test_where_there_is_nothing_to_guess_from_few_steps_look_for_it(monkeypatch: pytest.MonkeyPatch):
    """And all do again once one has found something. Prompts alone, from which nobody guesses, do not count."""
    scheduler = Scheduler(CONFIG)
    scheduler.add(request("a", prompt=3, max_tokens=1000))
    prompts = scheduler.schedule()
    scheduler.complete(prompts, [Sampled(7)])
    chunks = scheduler.schedule()
    drafter, lengths, looked = Guesser(), DraftLengths(0, 0, has_passes=False), []
    speculation = Speculation(drafter, 2, lengths)
    timed: list[int] = []
    monkeypatch.setattr(lengths, "took", lambda rows, seconds, steps: timed.append(rows))
    monkeypatch.setattr(lengths, "skips_step", lambda: False)
    monkeypatch.setattr(drafter, "most", lambda sequence, room: looked.append(sequence) or 0)

    def steps(count: int, of=chunks) -> int:
        looked.clear()
        for _ in range(count):
            speculation.extended(of, scheduler.blocks, 12, 32)
            speculation.completed(of)
        return len(looked)

    assert steps(2 * FRUITLESS, prompts) == 0 and steps(FRUITLESS) == FRUITLESS == len(timed)
    assert steps(4 * FRUITLESS) == 4 and len(timed) == FRUITLESS + 4
    monkeypatch.setattr(drafter, "most", lambda sequence, room: looked.append(sequence) or room)
    monkeypatch.setattr(speculation, "_chosen", lambda rows, found, budget: [])
    assert steps(2 * FRUITLESS) > FRUITLESS
