"""The step loop: in which order commands and steps come, what a failing step does, and that an idle loop sleeps.

The engine is a real scheduler with a step that makes up its tokens, and that the test can hold or break."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.step_loop import StepLoop
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.scheduler import Scheduler
from isotherm.cluster.engine.sequence import Sampled
from isotherm.cluster.messages.requests import Constraint, Delta, FinishReason, GenerationRequest, SamplingParams

TIMEOUT = 20.0  # seconds; only a failing test waits that long


class FakeEngine:
    def __init__(self, **config: Any):
        defaults = {"block_size": 4, "blocks": 64, "max_batch_tokens": 64, "max_sequences": 8, "max_model_len": 64}
        self.scheduler = Scheduler(SchedulerConfig(**(defaults | config)))
        self.events: list[Any] = []
        self.gate = threading.Event()  # a step waits for it
        self.gate.set()
        self.stepping = threading.Event()
        self.fail: Exception | None = None
        self.prepared: queue.Queue[Callable[[], None]] = queue.Queue()  # to be called when a grammar is there

    def prepare(self, request: GenerationRequest, then: Callable[[], None]) -> bool:
        self.prepared.put(then)
        return True

    def take_unsent(self) -> list[Delta]:
        return []

    def step(self) -> list[Delta]:
        chunks = self.scheduler.schedule()
        if not chunks:
            self.events.append("idle step")
            return []
        self.events.append(tuple(c.sequence.request.id for c in chunks))
        self.stepping.set()
        assert self.gate.wait(TIMEOUT)
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        return self.scheduler.complete(chunks, [Sampled(100 + c.sequence.generated) for c in chunks if c.sample])


class Running:
    """A loop over a fake engine, and what it published."""

    def __init__(self, **config: Any):
        self.engine = FakeEngine(**config)
        self.published: queue.Queue[list[Delta]] = queue.Queue()
        before = set(threading.enumerate())
        self.loop = StepLoop(cast(Engine, self.engine), self.published.put)
        (self.thread,) = set(threading.enumerate()) - before

    def until(self, done: Callable[[list[Delta]], bool]) -> list[Delta]:
        """Deltas, all steps together, until they satisfy `done`."""
        deltas: list[Delta] = []
        while not done(deltas):
            deltas += self.published.get(timeout=TIMEOUT)
        return deltas

    def until_finished(self, *ids: str) -> list[Delta]:
        return self.until(lambda deltas: {d.request_id for d in deltas if d.finish_reason is not None} >= set(ids))

    def in_a_step(self) -> None:
        """Wait until the loop is inside a step that the gate holds."""
        assert self.engine.stepping.wait(TIMEOUT)
        self.engine.stepping.clear()

    def flush(self) -> None:
        """Wait until the loop has taken every command so far."""
        taken = threading.Event()
        self.loop.between_steps(taken.set)
        assert taken.wait(TIMEOUT)


@pytest.fixture
def running() -> Running:
    return Running()


def request(
    name: str, max_tokens: int = 3, prompt: tuple[int, ...] = (1, 2, 3), generated: tuple[int, ...] = ()
) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(max_tokens), generated)


def of(deltas: list[Delta], name: str) -> list[Delta]:
    return [d for d in deltas if d.request_id == name]


def test_a_request_is_served_to_its_end(running: Running):
    running.loop.submit(request("a"))
    deltas = running.until_finished("a")
    assert [(d.start, d.token_ids) for d in deltas] == [(0, (100,)), (1, (101,)), (2, (102,))]
    assert [d.finish_reason for d in deltas] == [None, None, FinishReason.LENGTH]
    assert len(running.engine.scheduler) == 0 and running.engine.scheduler.blocks.used == 0


def test_a_full_queue_refuses_new_requests_only():
    running = Running(max_sequences=1, max_waiting=1)
    running.engine.gate.clear()
    running.loop.submit(request("a"))
    running.in_a_step()
    for one in (request("b"), request("c"), request("d").resumed(()), request("e", generated=(100,))):
        running.loop.submit(one)
    running.engine.gate.set()
    deltas = running.until_finished("a", "b", "c", "d", "e")
    [refused] = of(deltas, "c")
    assert (refused.finish_reason, refused.token_ids) == (FinishReason.REFUSED, ()) and "2 may" in refused.error
    for name, tokens in (("b", (100, 101, 102)), ("d", (100, 101, 102)), ("e", (101, 102))):
        assert tuple(t for d in of(deltas, name) for t in d.token_ids) == tokens


def constrained(name: str) -> GenerationRequest:
    return GenerationRequest(name, (1, 2, 3), SamplingParams(3, constraint=Constraint("start: NAME")))


def test_a_request_waits_for_its_grammar_and_others_go_on(running: Running):
    running.loop.submit(constrained("a"))
    running.loop.submit(request("b"))
    assert [d.request_id for d in running.until_finished("b")] == ["b"] * 3
    running.engine.prepared.get(timeout=TIMEOUT)()
    assert tuple(t for d in running.until_finished("a") for t in d.token_ids) == (100, 101, 102)


@pytest.mark.parametrize("moved", [False, True])
def test_a_request_that_is_aborted_while_it_waits_for_its_grammar_never_begins(running: Running, moved: bool):
    running.loop.submit(constrained("a"))
    (running.loop.give_back if moved else running.loop.abort)("a")
    [delta] = running.until_finished("a")
    assert delta.finish_reason is (FinishReason.MOVED if moved else FinishReason.ABORT)
    running.engine.prepared.get(timeout=TIMEOUT)()
    running.loop.abort("a")
    running.loop.submit(request("b"))
    assert {d.request_id for d in running.until_finished("b")} == {"b"}


def test_a_request_that_is_submitted_anew_takes_the_place_of_the_first(running: Running):
    running.engine.gate.clear()
    running.loop.submit(request("a", 4))
    running.in_a_step()
    running.loop.submit(request("a", 4, generated=(100, 101)))
    running.engine.gate.set()
    deltas = running.until(lambda ds: any(d.finish_reason is FinishReason.LENGTH for d in ds))
    assert [(d.start, d.token_ids, d.finish_reason) for d in deltas] == [
        (0, (100,), None),
        (0, (), FinishReason.ABORT),  # the end of the first
        (2, (102,), None),
        (3, (103,), FinishReason.LENGTH),
    ]
    assert len(running.engine.scheduler) == 0 and running.engine.scheduler.blocks.used == 0


def test_a_grammar_that_is_there_late_does_not_begin_an_old_version_of_its_request(running: Running):
    running.loop.submit(constrained("a"))
    running.loop.abort("a")
    running.loop.submit(constrained("a").resumed((100, 101)))
    of_the_first, of_the_second = (running.engine.prepared.get(timeout=TIMEOUT) for _ in range(2))
    of_the_first()
    running.flush()
    assert len(running.engine.scheduler) == 0
    of_the_second()
    deltas = running.until(lambda ds: any(d.finish_reason is FinishReason.LENGTH for d in ds))
    assert [(d.start, d.token_ids) for d in deltas] == [(0, ()), (2, (102,))]


def test_a_request_that_cannot_be_prepared_gets_an_error_and_the_loop_goes_on(
    running: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def broken(request: GenerationRequest, then: Callable[[], None]) -> bool:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(running.engine, "prepare", broken)
    monkeypatch.setattr("os._exit", lambda status: None)  # else a loop that fails would end this process
    running.loop.submit(constrained("a"))
    [delta] = running.until_finished("a")
    assert (delta.finish_reason, delta.error) == (FinishReason.ERROR, "can't start new thread")
    assert "request a could not be queued" in caplog.text
    running.loop.submit(request("b"))
    assert len(running.until_finished("b")) == 3


def test_a_list_is_published_for_each_step(running: Running):
    running.engine.gate.clear()
    running.loop.submit(request("first", 1))
    running.in_a_step()
    for name in ("a", "b", "c"):  # taken together, after the step
        running.loop.submit(request(name, 2))
    running.engine.gate.set()
    running.flush()
    lists = [running.published.get(timeout=TIMEOUT) for _ in range(3)]
    assert [[d.request_id for d in deltas] for deltas in lists] == [["first"], ["a", "b", "c"], ["a", "b", "c"]]
    assert running.engine.events[:3] == [("first",), ("a", "b", "c"), ("a", "b", "c")]


def test_commands_take_effect_in_the_order_they_came(running: Running):
    order: list[str] = []
    running.engine.gate.clear()
    running.loop.submit(request("a", 30))
    running.in_a_step()
    running.loop.between_steps(lambda: order.append("first"))
    running.loop.submit(request("b", 1))
    running.loop.between_steps(lambda: order.append(f"then, with {running.engine.scheduler.request_ids()}"))
    running.loop.abort("b")
    running.loop.between_steps(lambda: order.append(f"last, with {running.engine.scheduler.request_ids()}"))
    assert order == [], "nothing runs while a step does"
    running.engine.gate.set()
    running.flush()
    assert order == ["first", "then, with ['a', 'b']", "last, with ['a']"]
    deltas = running.until_finished("a", "b")
    assert [(d.token_ids, d.finish_reason) for d in of(deltas, "b")] == [((), FinishReason.ABORT)]
    assert all("b" not in event for event in running.engine.events)


def test_actions_run_on_the_loops_thread_between_steps(running: Running):
    seen: list[tuple[threading.Thread, bool]] = []
    running.engine.gate.clear()
    running.loop.submit(request("a", 5))
    running.in_a_step()
    running.loop.between_steps(lambda: seen.append((threading.current_thread(), running.engine.gate.is_set())))
    running.engine.gate.set()
    running.until_finished("a")
    assert seen == [(running.thread, True)]


def test_an_abort_frees_the_blocks_after_the_step_that_runs(running: Running):
    running.engine.gate.clear()
    running.loop.submit(request("a", 50))
    running.loop.submit(request("b", 2))
    running.in_a_step()
    running.loop.abort("a")
    assert running.engine.scheduler.blocks.used > 0
    running.engine.gate.set()
    deltas = running.until_finished("a", "b")
    assert of(deltas, "a")[-1].finish_reason is FinishReason.ABORT
    assert of(deltas, "b")[-1].finish_reason is FinishReason.LENGTH and len(of(deltas, "b")) == 2
    assert running.engine.scheduler.blocks.used == 0


def test_an_abort_of_what_is_not_there_says_nothing(running: Running):
    running.loop.submit(request("a", 1))
    running.until_finished("a")
    for name in ("a", "never"):
        running.loop.abort(name)
    running.flush()
    assert running.published.empty()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (request("x", prompt=()), "prompt is empty"),
        (request("x", prompt=tuple(range(64))), "prompt has 64 tokens; at most 63"),
        (request("x", 2, generated=(7, 8)), "of which it may have only 2"),
    ],
)
def test_a_request_that_can_never_be_served_gets_an_error_and_no_other_does(
    running: Running, bad: GenerationRequest, words: str
):
    running.engine.gate.clear()
    running.loop.submit(request("a", 4))
    running.in_a_step()
    running.loop.submit(bad)
    running.engine.gate.set()
    deltas = running.until(lambda ds: sum(len(d.token_ids) for d in of(ds, "a")) == 4 and any(d.error for d in ds))
    (error,) = [d for d in deltas if d.error]
    assert (error.request_id, error.finish_reason, error.start) == (
        bad.id,
        FinishReason.ERROR,
        len(bad.generated),
    ) and words in error.error
    assert [t for d in of(deltas, "a") for t in d.token_ids] == [100, 101, 102, 103]


def test_a_failing_step_fails_every_request_and_the_loop_goes_on(caplog: pytest.LogCaptureFixture):
    running = Running(max_sequences=2)
    running.engine.gate.clear()
    for name in ("a", "b", "waiting"):
        running.loop.submit(request(name, 5))
    running.in_a_step()
    running.engine.fail = ArithmeticError("the forward pass broke")
    running.engine.gate.set()
    deltas = running.until_finished("a", "b", "waiting")
    last = {d.request_id: d for d in deltas}
    for name in ("a", "b", "waiting"):
        assert (
            last[name].finish_reason is FinishReason.ERROR
            and last[name].error == "ArithmeticError: the forward pass broke"
        )
    assert "step failed" in caplog.text
    assert len(running.engine.scheduler) == 0 and running.engine.scheduler.blocks.used == 0
    running.loop.submit(request("after", 2))
    assert [d.token_ids for d in running.until_finished("after")] == [(100,), (101,)]


def test_requests_that_came_during_the_failing_step_are_served(running: Running):
    running.engine.gate.clear()
    running.loop.submit(request("a", 5))
    running.in_a_step()
    running.loop.submit(request("b", 2))
    running.engine.fail = RuntimeError("once")
    running.engine.gate.set()
    deltas = running.until_finished("a", "b")
    assert of(deltas, "a")[-1].finish_reason is FinishReason.ERROR
    assert [d.finish_reason for d in of(deltas, "b")] == [None, FinishReason.LENGTH]


def test_a_failing_action_stops_nothing(running: Running, caplog: pytest.LogCaptureFixture):
    def broken() -> None:
        raise LookupError("no such placement")

    running.loop.between_steps(broken)
    running.loop.submit(request("a", 2))
    assert len(running.until_finished("a")) == 2
    assert "no such placement" in caplog.text and running.thread.is_alive()


def test_an_idle_loop_sleeps(running: Running):
    running.loop.submit(request("a", 2))
    running.until_finished("a")
    running.flush()
    time.sleep(0.05)
    clock = time.pthread_getcpuclockid(cast(int, running.thread.ident))
    begin, events = time.clock_gettime(clock), len(running.engine.events)
    time.sleep(0.5)
    assert time.clock_gettime(clock) - begin < 0.005 and len(running.engine.events) == events
    running.loop.submit(request("b", 1))  # and wakes up
    running.until_finished("b")


def test_submissions_from_many_threads_are_all_served(running: Running):
    names = [f"{t}-{i}" for t in range(8) for i in range(20)]

    def submit(thread: int) -> None:
        for i in range(20):
            running.loop.submit(request(f"{thread}-{i}", 1 + i % 3))

    threads = [threading.Thread(target=submit, args=(t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    deltas = running.until_finished(*names)
    for thread in threads:
        thread.join()
    for name in names:
        assert [t for d in of(deltas, name) for t in d.token_ids] == list(range(100, 101 + int(name.split("-")[1]) % 3))


def test_a_loop_that_is_closed_ends_its_thread(running: Running):
    running.loop.close()  # an idle one
    running.thread.join(TIMEOUT)
    assert not running.thread.is_alive()


def test_a_loop_that_is_closed_ends_after_the_step_that_it_computes(running: Running):
    running.engine.gate.clear()
    running.loop.submit(GenerationRequest("a", (1, 2), SamplingParams(50)))
    running.in_a_step()
    running.loop.close()
    running.engine.gate.set()
    running.thread.join(TIMEOUT)
    assert not running.thread.is_alive() and len(running.engine.scheduler) == 1
