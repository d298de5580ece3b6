"""Who has died, who hangs and who only waits for another, told from what workers say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from virtual_time import run_in_virtual_time

from isotherm.cluster import background
from isotherm.cluster.control.worker_watch import LINKS_SECONDS, WAKING, WorkerWatch
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.messages.workers import LinkFailure

LIMIT = 0.2
PATIENCE = 0.15


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(background, "FIRST_PAUSE", 0.01)


class FakeWorker:
    def __init__(self, name: str):
        self.id = name
        self.dead = asyncio.Event()
        self.well = asyncio.Event()
        self.well.set()
        self.waiting_for, self.waits_since = "", asyncio.get_running_loop().time()
        self.links: tuple[int, dict[str, LinkFailure]] = (0, {})
        self.changed = asyncio.Event()
        self.asked_for_links = 0
        self.lost_answers = 0  # to the next questions of that kind
        self.away = 0  # calls that fail because Ray's head cannot be reached

    async def call(self, name: str, *args: Any) -> Any:
        if self.away:
            self.away -= 1
            raise RuntimeError("Ray's head is away")
        work = asyncio.ensure_future(getattr(self, name)(*args))
        dead = asyncio.ensure_future(self.dead.wait())
        await asyncio.wait([work, dead], return_when=asyncio.FIRST_COMPLETED)
        dead.cancel()
        if self.dead.is_set():
            work.cancel()
            raise WorkerGoneError(f"{self.id} was killed")
        return work.result()

    async def sentinel(self) -> None:
        await asyncio.Event().wait()

    async def sign_of_life(self) -> None:
        await self.well.wait()

    async def waits_for(self) -> tuple[str, float]:
        return self.waiting_for, asyncio.get_running_loop().time() - self.waits_since

    async def failed_links(self, known: int) -> tuple[int, dict[str, LinkFailure]]:
        self.asked_for_links += 1
        if self.lost_answers:
            self.lost_answers -= 1
            await asyncio.Event().wait()
        while self.links[0] == known:
            await self.changed.wait()
        return self.links

    def fail(self, version: int, **links: str) -> None:
        self.links = version, {group: LinkFailure(1, reason) for group, reason in links.items()}
        self.changed.set()
        self.changed = asyncio.Event()


class Told:
    def __init__(self) -> None:
        self.busy: set[str] = set()
        self.lost: dict[str, tuple[str, bool]] = {}
        self.links: list[tuple[str, dict[str, str]]] = []
        self.watch = WorkerWatch(LIMIT, self.busy.__contains__, self._lost, self._links, PATIENCE)

    def _lost(self, name: str, reason: str, unreachable: bool) -> None:
        assert name not in self.lost
        self.lost[name] = reason, unreachable
        self.watch.remove(name)

    def _links(self, name: str, failed: Mapping[str, LinkFailure]) -> None:
        self.links.append((name, {group: failure.reason for group, failure in failed.items()}))


def play(act: Callable[[Told, FakeWorker, FakeWorker], Awaitable[None]]) -> Told:
    async def go() -> Told:
        told, shard, group = Told(), FakeWorker("attention-0"), FakeWorker("expert-0")
        told.watch.add(shard, has_links=True)
        told.watch.add(group, has_links=False)
        await act(told, shard, group)
        for name in ("attention-0", "expert-0"):
            told.watch.remove(name)
        return told

    return run_in_virtual_time(go())


def test_nobody_is_lost_who_answers():
    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        await asyncio.sleep(4 * LIMIT)

    told = play(act)
    assert told.lost == {} and told.links == [("attention-0", {})]


def test_a_death_is_told_at_once():
    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        group.dead.set()
        await asyncio.sleep(LIMIT / 10)

    assert play(act).lost == {"expert-0": ("expert-0 was killed", False)}


def test_a_death_is_seen_though_rays_head_was_away_before():
    """The task that waited for it must not end with the first error."""

    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        group.away = 4
        told.watch.add(group, has_links=False)
        await asyncio.sleep(0.3)
        group.dead.set()
        await asyncio.sleep(0.3)

    assert play(act).lost["expert-0"] == ("expert-0 was killed", False)


def test_a_thread_that_does_not_go_on_is_found_though_its_process_answers():
    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        shard.well.clear()
        await asyncio.sleep(3 * LIMIT)

    assert play(act).lost == {"attention-0": (f"it hangs: no sign of life in {LIMIT:g} s", True)}


@pytest.mark.parametrize("after", [0.9, 1.0, 1.1, 1.2])
def test_the_limit_counts_from_the_last_sign_of_life(after: float):
    """And not from the next question, up to a quarter of the limit later."""
    lost: list[float] = []

    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        await asyncio.sleep(after * LIMIT)
        shard.well.clear()
        begin = asyncio.get_running_loop().time()
        while "attention-0" not in told.lost:
            await asyncio.sleep(0.002)
        lost.append(asyncio.get_running_loop().time() - begin)

    play(act)
    assert LIMIT * 0.6 < lost[0] < LIMIT * 1.15


def test_a_shard_that_waits_for_a_group_that_hangs_is_not_to_blame():
    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        shard.waiting_for = "expert-0"
        shard.well.clear()
        group.well.clear()
        await asyncio.sleep(2.5 * LIMIT)
        assert list(told.lost) == ["expert-0"]
        shard.well.set()  # its rows are sent to another
        await asyncio.sleep(3 * LIMIT)

    assert list(play(act).lost) == ["expert-0"]


@pytest.mark.parametrize("waited", [0.7 * PATIENCE, 1.1 * PATIENCE])
def test_who_waits_for_as_long_as_it_may_is_given_the_time_to_say_so(waited: float):
    """Its link fails at the end of that, and it goes on; it is asked in that very moment."""

    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        await asyncio.sleep(LIMIT / 2)
        shard.well.clear()
        await asyncio.sleep(LIMIT - waited)
        shard.waiting_for, shard.waits_since = "expert-0", asyncio.get_running_loop().time()
        await asyncio.sleep(PATIENCE + WAKING / 2)
        shard.waiting_for = ""
        shard.well.set()
        await asyncio.sleep(3 * LIMIT)

    assert play(act).lost == {}


def test_who_waits_longer_than_it_may_is_found_at_once():
    """And not after the limit once more."""
    lost: list[float] = []

    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        shard.waiting_for, shard.waits_since = "expert-0", asyncio.get_running_loop().time()
        shard.well.clear()
        while "attention-0" not in told.lost:
            await asyncio.sleep(0.002)
        lost.append(asyncio.get_running_loop().time() - shard.waits_since)

    play(act)
    assert PATIENCE + WAKING <= lost[0] < PATIENCE + WAKING + LIMIT


def test_a_shard_that_waits_for_a_group_that_is_well_hangs_itself():
    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        shard.waiting_for = "expert-0"
        shard.well.clear()
        await asyncio.sleep(WAKING + 4 * LIMIT)

    assert list(play(act).lost) == ["attention-0"]


def test_a_shard_whose_links_fall_silent_one_after_another_does_not_hang():
    """It reads them in turn, and each may take its time: together that is longer than a sign of life may."""

    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        shard.waiting_for = "expert-0"
        shard.well.clear()
        for _ in range(10):
            shard.waits_since = asyncio.get_running_loop().time()
            await asyncio.sleep(0.8 * PATIENCE)

    assert play(act).lost == {}


def test_a_shard_that_goes_on_waiting_for_a_group_that_is_gone_hangs_itself():
    """Its thread stands still, and not for the group's sake: the link's loss would have woken it."""

    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        shard.waiting_for = "expert-0"
        shard.well.clear()
        group.dead.set()
        await asyncio.sleep(5 * LIMIT)

    assert list(play(act).lost) == ["expert-0", "attention-0"]


def test_who_is_busy_need_give_no_sign():
    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        told.busy.add("expert-0")
        group.well.clear()
        await asyncio.sleep(4 * LIMIT)

    assert play(act).lost == {}


def test_links_are_told_when_they_change():
    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        await asyncio.sleep(0.01)
        shard.fail(1, **{"expert-0": "reset"})
        await asyncio.sleep(0.01)
        shard.fail(2)
        await asyncio.sleep(0.01)

    assert play(act).links == [("attention-0", {}), ("attention-0", {"expert-0": "reset"}), ("attention-0", {})]


def test_a_shard_whose_answer_is_lost_is_asked_for_its_links_again():
    async def act(told: Told, shard: FakeWorker, group: FakeWorker) -> None:
        shard.lost_answers = 1
        await asyncio.sleep(0.01)
        assert shard.asked_for_links == 1
        shard.fail(1, **{"expert-0": "reset"})
        await asyncio.sleep(LINKS_SECONDS + 1)
        assert shard.asked_for_links == 3, "the third waits for the next change"

    assert play(act).links == [("attention-0", {"expert-0": "reset"})]
