"""Suspects are tried alone at first, and in growing company where that takes long: the one that is the cause is found,
and those that are not wait no longer than they must."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import Callable

import pytest
from virtual_time import run_in_virtual_time

from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, SamplingParams
from isotherm.cluster.routing.journey import Journey
from isotherm.cluster.routing.trial import STUCK_SECONDS, UNREST_SECONDS, Trial


class Shard:
    """Computes suspects for so long each, all that it has at once; dies of a request that is poison as soon as it has
    it for half that time, and is replaced."""

    def __init__(self, seconds: float | Callable[[int], float], poison: int | None):
        self.seconds: Callable[[int], float] = seconds if callable(seconds) else lambda number: seconds
        self.poison = poison
        self.deaths = 0
        self.done: dict[int, float] = {}  # when each gave a token
        self.together: list[int] = []  # how many it had at each arrival
        self.here: dict[int, asyncio.Future[bool]] = {}

    async def compute(self, number: int) -> bool:
        """Whether it gave a token."""
        self.here[number] = asyncio.get_running_loop().create_future()
        self.together.append(len(self.here))
        loop, seconds = asyncio.get_running_loop(), self.seconds(number)
        if number == self.poison:
            loop.call_later(seconds / 2, self.die)
        loop.call_later(seconds, self._done, self.here[number])
        try:
            if gave := await self.here[number]:
                self.done[number] = loop.time()
            return gave
        finally:
            self.here.pop(number, None)

    def _done(self, future: asyncio.Future[bool]) -> None:
        if not future.done():
            future.set_result(True)

    def die(self) -> None:
        self.deaths += 1
        for future in self.here.values():
            if not future.done():
                future.set_result(False)


REQUEST = GenerationRequest("r", (1,), SamplingParams(9))


def suspect() -> Journey:
    journey = Journey(REQUEST)
    journey.take(Delta("r", 0, finish_reason=FinishReason.LOST))
    return journey


async def serve(trial: Trial, shard: Shard, number: int, heard: bool = False) -> tuple[int, bool]:
    """One request under which a shard was lost just now → (number, whether it got on). `heard`: that shard had given a
    token of it."""
    journey = Journey(GenerationRequest(str(number), (1,), SamplingParams(9)))
    lost = Delta(str(number), 0, finish_reason=FinishReason.LOST)
    async with trial.place(journey) as place:
        if heard:
            journey.take(Delta(str(number), 0, (100,)))
        journey.take(lost)
        place.lost()
    while journey.verdict(trial.losses_allowed()) is None:
        async with trial.place(journey) as place:
            if await shard.compute(number):
                place.cleared()
                return number, True
            journey.take(lost, place.in_company)
            place.lost()
    trial.found(journey)
    return number, False


def play(
    count: int, seconds: float | Callable[[int], float], poison: int | None = None, heard: int = 0
) -> tuple[dict[int, bool], Shard, float]:
    """`heard`: the first so many were."""

    async def act() -> tuple[dict[int, bool], Shard, float]:
        trial, shard = Trial(), Shard(seconds, poison)
        served = await asyncio.gather(*(serve(trial, shard, i, i < heard) for i in range(count)))
        return dict(served), shard, asyncio.get_running_loop().time()

    return run_in_virtual_time(act())


def test_those_that_are_tried_quickly_are_tried_one_at_a_time():
    served, shard, seconds = play(20, 0.02)
    assert all(served.values()) and shard.together == [1] * 20 and seconds < 0.5


def test_a_second_loss_a_second_later_finds_no_innocent_one_alone():
    """Though none of them had been heard of: a worker that is killed whenever it has been replaced."""

    async def act() -> None:
        trial, shard = Trial(), Shard(0.05, None)
        work = [asyncio.ensure_future(serve(trial, shard, i)) for i in range(40)]
        await asyncio.sleep(0.75)
        assert len(shard.here) > 1
        shard.die()
        assert all(dict(await asyncio.gather(*work)).values())

    run_in_virtual_time(act())


@pytest.mark.parametrize("unrest", [False, True])
def test_who_is_alone_at_a_second_loss_has_another_try_where_shards_are_lost_anyway(unrest: bool):
    """All suspects of a loss a while ago have got on: somebody kills shards, or their machine does."""

    async def act() -> tuple[dict[int, bool], int]:
        trial, shard = Trial(), Shard(0.2, None)
        if unrest:
            assert all(dict(await asyncio.gather(*(serve(trial, shard, i) for i in range(4)))).values())
            await asyncio.sleep(UNREST_SECONDS / 2)
        work = [asyncio.ensure_future(serve(trial, shard, i)) for i in range(4)]
        await asyncio.sleep(0.1)
        assert len(shard.here) == 1
        shard.die()
        return dict(await asyncio.gather(*work)), trial.losses_allowed()

    served, allowed = run_in_virtual_time(act())
    assert sum(served.values()) == (4 if unrest else 3) and allowed == (3 if unrest else 2)


def test_a_cause_takes_one_shard_more_where_shards_are_lost_anyway():
    async def act() -> int:
        trial, shard = Trial(), Shard(0.2, 7)
        await asyncio.gather(*(serve(trial, shard, i) for i in range(4)))
        served = dict(await asyncio.gather(*(serve(trial, shard, i) for i in range(4, 8))))
        assert [number for number, got_on in served.items() if not got_on] == [7]
        await asyncio.sleep(UNREST_SECONDS)
        assert trial.losses_allowed() == 2, "after a cause was found that is no unrest"
        return shard.deaths

    assert run_in_virtual_time(act()) == 2


def test_who_has_gone_is_no_suspect():
    """Its client has given up: the others decide whether there is unrest."""

    async def act() -> None:
        trial, shard = Trial(), Shard(1.0, None)
        gone, other = (asyncio.ensure_future(serve(trial, shard, i)) for i in range(2))
        await asyncio.sleep(0.5)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        del gone
        gc.collect()
        assert await other == (1, True) and trial.losses_allowed() == 3

    run_in_virtual_time(act())


def test_many_long_prompts_are_tried_in_growing_company():
    served, shard, seconds = play(64, 2.0)
    assert all(served.values()) and shard.together[:2] == [1, 1] and max(shard.together) >= 16
    assert seconds < 20, "one after another they would take 128 s"


@pytest.mark.parametrize("poison", [0, 1, 5, 20, 39])
@pytest.mark.parametrize("seconds", [0.01, 0.5])
def test_the_cause_is_found_and_the_others_are_served(poison: int, seconds: float):
    served, shard, _ = play(40, seconds, poison)
    assert [number for number, got_on in served.items() if not got_on] == [poison]
    # After the loss that made them suspects: one where it was tried alone, two where it was not.
    assert shard.deaths == (1 if seconds == 0.01 or poison < 2 else 2)


def test_those_that_were_heard_of_are_tried_in_growing_company_at_once():
    """So that a shard that is killed once more, a second later, finds no innocent one alone."""
    served, shard, seconds = play(40, 0.05, heard=40)
    assert all(served.values()) and seconds < 0.5 and shard.together[0] == 1 and max(shard.together) >= 16


def test_those_that_were_not_heard_of_come_first_and_alone():
    """But for the first to come, whoever that is."""
    served, shard, seconds = play(20, 0.05, heard=12)
    assert all(served.values()) and shard.together[:9] == [1] * 9 and max(shard.together) >= 4 and seconds < 0.8


@pytest.mark.parametrize("poison", [1, 5, 12, 19])
def test_the_cause_is_found_among_those_that_were_heard_of_and_those_that_were_not(poison: int):
    served, shard, _ = play(20, 0.05, poison, heard=12)
    assert [number for number, got_on in served.items() if not got_on] == [poison]
    assert shard.deaths == (2 if poison < 12 else 1)


def test_a_loss_in_company_accuses_nobody():
    async def act() -> None:
        trial, shard = Trial(), Shard(1.0, None)
        work = [asyncio.ensure_future(serve(trial, shard, i)) for i in range(16)]
        while max(shard.together, default=0) < 4:
            await asyncio.sleep(0.1)
        shard.die()
        served = dict(await asyncio.gather(*work))
        assert all(served.values())
        at = shard.together.index(4)
        assert 1 in shard.together[at:], "alone again after it"

    run_in_virtual_time(act())


@pytest.mark.parametrize(("slow", "limit"), [(1, 1.2 * STUCK_SECONDS), (4, 3.2 * STUCK_SECONDS)])
def test_those_that_take_long_do_not_hold_up_the_others(slow: int, limit: float):
    """A long prompt that was never heard of comes before the streams that were, and takes a minute."""
    served, shard, seconds = play(40 + slow, lambda number: 0.05 if number < 40 else 60.0, heard=40)
    assert all(served.values()) and seconds > 60
    assert max(shard.done[number] for number in range(40)) < limit


@pytest.mark.parametrize("which", range(4))
def test_one_that_is_tried_alone_and_takes_long_does_not_hold_up_the_others(which: int):
    async def act() -> None:
        trial, shard = Trial(), Shard(1.0, None)
        work = [asyncio.ensure_future(serve(trial, shard, i)) for i in range(16)]
        while len(shard.here) < 4:
            await asyncio.sleep(0.1)
        slow, lost_at = sorted(shard.here)[which], asyncio.get_running_loop().time()
        shard.seconds = lambda number: 60.0 if number == slow else 0.05
        shard.die()
        assert all(dict(await asyncio.gather(*work)).values())
        assert max(at for number, at in shard.done.items() if number != slow) - lost_at < 4.2 * STUCK_SECONDS

    run_in_virtual_time(act())


@pytest.mark.parametrize("poison", range(4))
@pytest.mark.parametrize("seconds", [5.0, 20.0, 60.0])
def test_a_slow_cause_among_others_that_are_slow_is_found(poison: int, seconds: float):
    """It meets its end after half the time, when others have come to it: with each loss they come later."""
    served, shard, _ = play(4, seconds, poison)
    assert [number for number, got_on in served.items() if not got_on] == [poison]
    assert shard.deaths <= 4


def test_who_waits_behind_one_that_gives_up_is_let_in():
    async def act() -> None:
        trial = Trial()
        company = suspect()
        company.take(Delta("r", 0, finish_reason=FinishReason.LOST), in_company=True)

        async def stay(journey: Journey) -> None:
            async with trial.place(journey):
                there.append(journey)
                await asyncio.Event().wait()

        there: list[Journey] = []
        work = []
        for journey in (suspect(), company, suspect()):
            work.append(asyncio.ensure_future(stay(journey)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert len(there) == 1, "the second wants nobody beside it, and the third waits for that one"
        trial._width = 2  # as where some have been cleared
        work[1].cancel()
        await asyncio.gather(work[1], return_exceptions=True)
        await asyncio.sleep(0)
        assert len(there) == 2 and asyncio.get_running_loop().time() == 0

    run_in_virtual_time(act())


def test_who_gives_up_leaves_the_turn_to_others():
    async def act() -> None:
        trial, shard = Trial(), Shard(1.0, None)
        first, second, third = (asyncio.ensure_future(serve(trial, shard, i)) for i in range(3))
        await asyncio.sleep(0.5)
        second.cancel()  # while it waits
        first.cancel()  # while it is computed
        assert await third == (2, True)
        await asyncio.gather(first, second, return_exceptions=True)
        async with trial.place(suspect()):
            pass  # nobody is left inside

    run_in_virtual_time(act())


def test_who_is_left_by_the_others_is_alone():
    async def act() -> None:
        trial, there = Trial(), []
        go_on = [asyncio.Event() for _ in range(3)]

        async def stay(number: int) -> None:
            async with trial.place(suspect()) as place:
                there.append(place)
                await go_on[number].wait()
                place.cleared()

        work = [asyncio.ensure_future(stay(i)) for i in range(3)]
        await asyncio.sleep(2)
        assert len(there) == 1 and not there[0].in_company
        go_on[0].set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(there) == 3 and there[1].in_company and there[2].in_company
        go_on[2].set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not there[1].in_company
        go_on[1].set()
        await asyncio.gather(*work)

    run_in_virtual_time(act())


def test_who_is_no_suspect_has_no_turn_to_wait_for():
    async def act() -> None:
        trial = Trial()
        async with trial.place(suspect()), trial.place(Journey(REQUEST)) as innocent:
            innocent.cleared()
            innocent.lost()
            assert not innocent.in_company and not innocent.is_on_trial

    run_in_virtual_time(act())


def test_nobody_waits_while_there_is_room():
    async def act() -> None:
        trial = Trial()
        for _ in itertools.repeat(None, 5):
            async with trial.place(suspect()) as place:
                place.cleared()
            assert asyncio.get_running_loop().time() == 0

    run_in_virtual_time(act())
