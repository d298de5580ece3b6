"""An ingress replica that stands still is killed soon, one whose event loop hangs later; one that is busy, or watched
by a process that stood still itself, never."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from virtual_time import run_in_virtual_time

from isotherm.cluster.background import Background
from isotherm.cluster.control import ingress_watch
from isotherm.cluster.control.ingress_watch import FIRST_SECONDS, PAUSE, STANDING_SECONDS, IngressWatch
from isotherm.cluster.messages.membership import WorkerGoneError

LIMIT = 15.0


class FakeReplica:
    """`lag`: seconds that its event loop takes; `stirs`: whether its other threads go on; `far`: seconds until it can
    be asked, and again until its first answer has come."""

    def __init__(self, far: float = 0.0) -> None:
        self.lag, self.stirs, self.asked, self.far = 0.0, True, 0, far
        self.killed: list[float] = []  # when
        self.gone = asyncio.Event()

    async def _after(self, seconds: float) -> None:
        dying = asyncio.ensure_future(self.gone.wait())
        done, _ = await asyncio.wait([dying], timeout=seconds)
        dying.cancel()
        if done:
            raise WorkerGoneError("it was killed")

    async def reach(self) -> None:
        await asyncio.sleep(self.far)

    async def answer(self) -> None:
        self.asked += 1
        await self._after(self.lag + self._connecting())

    async def stir(self) -> None:
        await self._after(self._connecting() if self.stirs else 3600.0)

    def _connecting(self) -> float:
        return self.far if self.asked == 1 else 0.0

    async def kill(self) -> None:
        self.killed.append(asyncio.get_running_loop().time())
        self.gone.set()

    def stop(self) -> None:
        self.lag, self.stirs = 3600.0, False


def play(
    act: Callable[[FakeReplica], Awaitable[None]], limit: float = LIMIT, reports: int = 1, far: float = 0.0
) -> FakeReplica:
    async def go() -> FakeReplica:
        replica, background = FakeReplica(far), Background()
        watch = IngressWatch(background, lambda name: replica, limit)
        for _ in range(reports):
            watch.follow("ingress-a")
        await act(replica)
        await background.close()
        return replica

    return run_in_virtual_time(go())


def test_one_that_stands_still_is_killed_within_four_seconds():
    async def act(replica: FakeReplica) -> None:
        await asyncio.sleep(20.2)
        assert not replica.killed
        replica.stop()
        await asyncio.sleep(30)

    replica = play(act, reports=3)
    assert len(replica.killed) == 1, "once, however often it has reported"
    assert STANDING_SECONDS <= replica.killed[0] - 20.2 <= STANDING_SECONDS + PAUSE < 4.0


def test_who_is_killed_is_told_before_anybody_can_see_it_gone():
    told: list[list[str]] = []

    async def go() -> None:
        replica, background = FakeReplica(), Background()
        watch = IngressWatch(background, lambda name: replica, LIMIT)
        killing = replica.kill

        async def kill() -> None:
            told.append(list(watch.killed))
            await killing()

        replica.kill = kill  # type: ignore[method-assign]
        watch.follow("ingress-a")
        await asyncio.sleep(5)
        assert watch.killed == []
        replica.stop()
        await asyncio.sleep(10)
        await background.close()

    run_in_virtual_time(go())
    assert told == [["ingress-a"]]


def test_a_watcher_that_has_just_begun_takes_its_time_to_reach_it():
    """A controller that was killed beside starting workers needed four seconds, and killed the replica that served."""

    async def act(replica: FakeReplica) -> None:
        await asyncio.sleep(40)

    assert play(act, limit=5.0, far=9.0).killed == []


def test_one_that_never_answers_a_new_watcher_is_killed():
    async def act(replica: FakeReplica) -> None:
        replica.stop()
        await asyncio.sleep(60)

    replica = play(act, limit=5.0)
    assert len(replica.killed) == 1 and replica.killed[0] == FIRST_SECONDS


def test_one_that_goes_on_again_in_time_is_let_alone():
    async def act(replica: FakeReplica) -> None:
        replica.lag, replica.stirs = STANDING_SECONDS - 0.4, False
        await asyncio.sleep(60)

    assert play(act).killed == []


def test_one_that_is_busy_has_the_whole_limit():
    async def act(replica: FakeReplica) -> None:
        replica.lag = LIMIT - 2
        await asyncio.sleep(100)

    assert play(act).killed == []


def test_one_whose_event_loop_hangs_is_killed_at_the_limit():
    async def act(replica: FakeReplica) -> None:
        replica.lag = 3600.0
        await asyncio.sleep(100)

    replica = play(act)
    assert len(replica.killed) == 1 and LIMIT <= replica.killed[0] <= LIMIT + PAUSE


def test_nobody_is_watched_where_nobody_is_to_be():
    async def act(replica: FakeReplica) -> None:
        replica.stop()
        await asyncio.sleep(100)

    replica = play(act, limit=0.0)
    assert replica.asked == 0 and replica.killed == []


def test_one_that_has_ended_is_forgotten_and_another_of_its_name_watched():
    async def act(replica: FakeReplica) -> None:
        replica.lag = 1.0
        await asyncio.sleep(0.1)
        replica.gone.set()
        await asyncio.sleep(10)
        assert replica.asked == 1

    assert play(act).killed == []


def test_a_watcher_that_stood_still_blames_nobody(monkeypatch):
    """All of the machine stands still for longer than anybody may, and goes on."""
    monkeypatch.setattr(ingress_watch, "STANDING_SECONDS", 0.2)

    async def go() -> list[float]:
        replica, background = FakeReplica(), Background()
        IngressWatch(background, lambda name: replica, 10.0).follow("ingress-a")
        await asyncio.sleep(0.05)
        for _ in range(3):
            replica.lag = 0.15  # it stands still too, and goes on a little later
            await asyncio.sleep(0.51)
            time.sleep(0.5)
        await background.close()
        return replica.killed

    monkeypatch.setattr(ingress_watch, "PAUSE", 0.01)
    assert asyncio.run(go()) == []
