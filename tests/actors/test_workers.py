"""The two actors as plain objects in this process: a shard and a group over a real link, and what they say when it
fails or a thread hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from linked_workers import REQUEST, SCHEDULER, Workers, play
from loaded_model import alone
from torch import Tensor

from isotherm.actors.attention.delivery import UnknownConnectionError
from isotherm.actors.attention.exchange import ExpertExchange
from isotherm.actors.attention.shard import AttentionShard
from isotherm.actors.links.protocol import LinkError, NativeLink
from isotherm.actors.models.local_experts import LocalExperts
from isotherm.cluster.messages.membership import SupersededError
from isotherm.cluster.messages.requests import Delta, GenerationRequest, SamplingParams
from isotherm.cluster.messages.workers import LinkFailure
from isotherm.kernels.native import ring

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # what a worker sets for its process


KINDS = ["shared-memory", "process-group"]


def test_a_shards_cache_is_kept_as_its_spec_says():
    spec = replace(Workers("process-group").shard.spec, kv_cache_dtype="fp8")
    model = AttentionShard(spec, "127.0.0.1", SCHEDULER)._load()
    assert {cache.dtype for cache in model.new_cache(1, 16)} == {torch.uint8}


def fail_at(workers: Workers, call: int) -> tuple[list[bool], str]:
    """Have the link fail when it is used for the `call`-th time → the calls so far, and what will be said of it."""
    link, calls = workers.shard._links["expert-0"], []
    if isinstance(link, NativeLink):  # it is used in native code, all layers of a step at once
        exchange = workers.shard._exchange
        assert exchange is not None and exchange._native is not None
        native, advance, layers = exchange._native, exchange._native.advance, len(exchange.placement.layers)
        assert call % layers == 0

        def lost(*arguments: Any) -> Any:
            calls.extend([True] * layers)
            if len(calls) == call:
                ring.load().iso_end_abandon(link.end)
            return advance(*arguments)

        native.advance = lost  # type: ignore[method-assign]
        return calls, "the group is gone"
    receive = link.receive

    def reset(*progress: Any) -> Tensor:
        calls.append(True)
        if len(calls) == call:
            raise LinkError("connection reset")
        return receive(*progress)

    link.receive = reset  # type: ignore[method-assign]
    return calls, "connection reset"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_over_a_new_link(kind: str):
    """One data socket is reset: the shard says so, the controller makes another, and not a token changes."""

    async def act(workers: Workers) -> None:
        shard = workers.shard
        calls, reason = fail_at(workers, 100)
        version, failed = await shard.failed_links(-1)
        assert failed == {}
        await shard.submit("replica", [REQUEST], [])
        version, failed = await shard.failed_links(version)
        assert failed == {"expert-0": LinkFailure(1, reason)}
        assert (await shard.status())["failed_links"] == {"expert-0": reason}
        await shard.sign_of_life()  # its thread waits for the link, and is well
        assert len(calls) == 100
        await workers.link()
        version, failed = await shard.failed_links(version)
        assert failed == {}
        assert await workers.finished() == alone(REQUEST)
        shard._link_failed("expert-0", shard._links["expert-0"], "again")
        assert (await shard.failed_links(version))[1] == {"expert-0": LinkFailure(2, "again")}

    play(kind, act)


def test_experts_that_cannot_be_reached_hold_requests_up_however_slow_the_machine_is():
    """What was lost is neither work nor a slow answer, which may take as long as they have taken lately."""

    async def act(workers: Workers) -> None:
        shard = workers.shard
        assert shard._steps is not None
        pulse = shard._steps.pulse
        for seconds in (9.0, 9.0):
            pulse.worked(seconds)
            pulse.answered(seconds)
        fail_at(workers, 100)
        await shard.submit("replica", [REQUEST], [])
        await shard.failed_links((await shard.failed_links(-1))[0])
        for _ in range(12):
            assert await shard.held_up(0.1) == "worker cannot reach expert-0"
            await shard.sign_of_life()
        await workers.link()
        assert await workers.finished() == alone(REQUEST)
        assert await shard.held_up(1.0) == ""

    play("process-group", act)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_whose_thread_hangs_gives_no_sign_of_life(kind: str):
    async def act(workers: Workers) -> None:
        shard, group = workers.shard, workers.group
        await asyncio.gather(shard.sign_of_life(), group.sign_of_life())  # both rest
        with group.worker.gate:  # the computing thread cannot go on, the event loop can
            await shard.submit("replica", [REQUEST], [])
            while (await shard.waits_for())[0] != "expert-0":
                await asyncio.sleep(0.01)
            for worker in (shard, group):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(worker.sign_of_life(), 1.0)
        assert await workers.finished() == alone(REQUEST)
        assert await shard.waits_for() == ("", 0.0)
        await asyncio.gather(shard.sign_of_life(), group.sign_of_life())

    play(kind, act)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_has_hung_once_may_not_hang_longer_the_next_time(kind: str):
    """How long it hung is no measure of how long its work takes; nor are others ready for as long again."""

    async def act(workers: Workers) -> None:
        shard, group = workers.shard, workers.group

        async def serve(name: str) -> None:
            workers.got.clear()
            await shard.submit("replica", [replace(REQUEST, id=name)], [])

        await serve("before")
        await workers.finished()
        for name in ("once", "again"):
            with group.worker.gate:
                await serve(name)
                while (await shard.waits_for())[0] != "expert-0":
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.5)
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(group.sign_of_life(), 0.6)
                assert (await shard.held_up(0.1)).startswith("worker has waited for expert-0 for "), name
            await workers.finished()
            assert await shard.held_up(1.0) == ""

    play(kind, act)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_guesses_by_itself_where_the_experts_for_that_are_few(monkeypatch: pytest.MonkeyPatch, kind, kept):
    if not kept:
        monkeypatch.setattr("isotherm.cluster.model.config.KEPT_WEIGHTS", 1)

    async def act(workers: Workers) -> None:
        engine = workers.shard._steps.engine
        engine.speculation.lengths = None  # as many as there can be, in each step
        layer = workers.shard.checkpoint.config.num_hidden_layers
        await workers.shard.submit("replica", [REQUEST], [])
        assert await workers.finished() == alone(REQUEST)
        assert engine.speculation.meter().accepted[0] > 0 and not engine.speculation.stopped
        assert (workers.group.worker.rows_served[layer].sum() == 0) == kept
        assert isinstance(engine.speculation.drafter._experts, LocalExperts if kept else ExpertExchange)

    play(kind, act, "mtp")


def test_requests_come_over_open_connections_only():
    async def act(workers: Workers) -> None:
        with pytest.raises(UnknownConnectionError):
            await workers.shard.submit("another", [REQUEST], [])
        await workers.shard.submit("replica", [REQUEST], [])
        assert await workers.finished() == alone(REQUEST)

    play("shared-memory", act)


def test_an_older_controller_is_refused():
    async def act(workers: Workers) -> None:
        await workers.group.order(2, "pid")
        with pytest.raises(SupersededError, match="worker obeys controller 2, not 1: drop is refused"):
            await workers.group.order(1, "drop", [(1, 0)])
        assert (1, 0) in await workers.group.held()

    play("shared-memory", act)


def test_a_shard_that_is_drained_gives_back_what_is_left():
    async def act(workers: Workers) -> None:
        long = GenerationRequest("long", REQUEST.prompt, SamplingParams(900, seed=1))
        await workers.shard.submit("replica", [long], [])
        assert await workers.shard.drain(0.1) == 1
        await asyncio.sleep(0.05)
        assert workers.got[-1].finish_reason is not None and workers.got[-1].finish_reason.value == "moved"

    play("shared-memory", act)


# --- its threads ----------------------------------------------------------------------------------


def fail_in_a_step(workers: Workers) -> None:
    def full(deltas: list[Delta]) -> None:
        raise MemoryError("no room for deltas")

    assert workers.shard._steps is not None
    workers.shard._steps._publish = full
    workers.shard._steps.submit(REQUEST)


def fail_in_the_group(workers: Workers) -> None:
    workers.group.server._inbox.put(("no message",))  # type: ignore[arg-type]


def fail_at_an_event(workers: Workers) -> None:
    assert workers.group.loop is not None
    workers.group.loop._shards = None  # type: ignore[assignment]
    workers.shard._links["expert-0"].close()


@pytest.mark.parametrize(
    ("fail", "thread"),
    [(fail_in_a_step, "step loop"), (fail_in_the_group, "experts"), (fail_at_an_event, "expert loop events")],
)
def test_a_worker_ends_with_the_thread_that_it_is_there_for(
    fail: Callable[[Workers], None], thread: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """It is replaced then, and its requests go on elsewhere; with a thread less it would answer, and do nothing."""
    ended: list[tuple[str, int]] = []
    monkeypatch.setattr("os._exit", lambda status: ended.append((threading.current_thread().name, status)))
    monkeypatch.setattr("logging.shutdown", lambda: None)

    async def act(workers: Workers) -> None:
        fail(workers)
        for _ in range(1000):
            await asyncio.sleep(0.01)
            if ended:
                return

    play("shared-memory", act)
    assert ended == [(thread, 1)]
    assert f"thread {thread} failed; this process ends" in caplog.text
