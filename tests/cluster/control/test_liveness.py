"""A controller that hangs is killed, once, whoever watches; one that is busy, or being started, is not."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable

import pytest
from virtual_time import run_in_virtual_time

from isotherm.cluster.control.liveness import answers_within, watch_controller

LIMIT = 0.2


class Ray:
    """One controller, and what Ray knows of it."""

    def __init__(self) -> None:
        self.restarts = 0
        self.starting = False
        self.away = False  # Ray's head
        self.slow = 0.0  # seconds that it takes to say who the controller is
        self.stubborn = 0  # kills that do nothing
        self.awake = asyncio.Event()
        self.awake.set()
        self.claims: set[tuple[str, int]] = set()
        self.kills = 0

    async def incarnation(self) -> str | None:
        if self.away:
            raise ConnectionError("no route to Ray's head")
        await asyncio.sleep(self.slow)
        return None if self.starting else f"abc/{self.restarts}"

    async def answer(self) -> None:
        await self.awake.wait()

    async def claim(self, incarnation: str, attempt: int) -> bool:
        await asyncio.sleep(0)
        first = (incarnation, attempt) not in self.claims
        self.claims.add((incarnation, attempt))
        return first

    async def kill(self) -> None:
        self.kills += 1
        if self.kills > self.stubborn:
            self.restart()

    def restart(self) -> None:
        self.restarts += 1
        self.awake.set()


def play(act: Callable[[Ray], Awaitable[None]], watchers: int = 3) -> Ray:
    async def go() -> Ray:
        ray = Ray()
        tasks = [asyncio.create_task(watch_controller(ray, LIMIT)) for _ in range(watchers)]
        await asyncio.sleep(LIMIT)
        await act(ray)
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return ray

    return run_in_virtual_time(go())


def test_one_of_all_watchers_kills_it_and_only_once():
    async def hang(ray: Ray) -> None:
        ray.awake.clear()
        begin = asyncio.get_running_loop().time()
        while not ray.kills:
            await asyncio.sleep(0.01)
        assert LIMIT <= asyncio.get_running_loop().time() - begin < 2 * LIMIT
        await asyncio.sleep(3 * LIMIT)

    ray = play(hang)
    assert (ray.kills, ray.restarts) == (1, 1)


def test_it_is_killed_again_where_that_had_no_effect_and_when_it_hangs_again():
    async def hang(ray: Ray) -> None:
        ray.stubborn = 1
        ray.awake.clear()
        await asyncio.sleep(4 * LIMIT)
        assert (ray.kills, ray.restarts) == (2, 1)
        ray.awake.clear()
        await asyncio.sleep(2 * LIMIT)

    ray = play(hang)
    assert (ray.kills, ray.restarts) == (3, 2)


def test_busy_is_not_hung():
    async def busy(ray: Ray) -> None:
        for _ in range(5):
            ray.awake.clear()
            await asyncio.sleep(0.6 * LIMIT)
            ray.awake.set()
            await asyncio.sleep(0)

    assert play(busy).kills == 0


def test_one_that_ray_starts_is_let_alone():
    async def start(ray: Ray) -> None:
        ray.awake.clear()
        ray.starting = True
        await asyncio.sleep(5 * LIMIT)
        ray.restart()
        ray.starting = False
        await asyncio.sleep(2 * LIMIT)

    assert play(start).kills == 0


def test_who_was_silent_and_has_been_started_again_is_not_killed():
    async def restart(ray: Ray) -> None:
        ray.awake.clear()
        await asyncio.sleep(0.9 * LIMIT)
        ray.restarts += 1  # the call that was sent to the one before is still open
        await asyncio.sleep(0.6 * LIMIT)
        ray.awake.set()
        await asyncio.sleep(2 * LIMIT)

    assert play(restart).kills == 0


def test_watching_goes_on_after_rays_head_was_away(caplog: pytest.LogCaptureFixture):
    async def away(ray: Ray) -> None:
        ray.away = True
        ray.awake.clear()
        await asyncio.sleep(3 * LIMIT)
        assert ray.kills == 0
        ray.away = False
        await asyncio.sleep(2 * LIMIT)

    assert play(away, 1).kills == 1
    assert "cannot look after the controller: ConnectionError: no route" in caplog.text


def test_who_was_silent_while_rays_head_stood_still_is_not_killed():
    """It waited for the head as well, maybe in a call that blocked its event loop."""

    async def stand_still(ray: Ray) -> None:
        ray.slow = 2 * LIMIT
        ray.awake.clear()
        await asyncio.sleep(4 * LIMIT)
        ray.slow = 0.0
        ray.awake.set()
        await asyncio.sleep(4 * LIMIT)
        assert ray.kills == 0
        ray.awake.clear()
        await asyncio.sleep(3 * LIMIT)

    assert play(stand_still).kills == 1, "one that hangs is killed once the head answers again"


def test_the_watchers_own_standing_still_is_nobodys_silence():
    async def go() -> bool:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        loop.call_later(0.05, lambda: loop.call_later(0.05, answer.set_result, None))
        waiting = asyncio.create_task(answers_within(answer, LIMIT))
        await asyncio.sleep(0)
        time.sleep(2 * LIMIT)
        return await waiting

    assert run_in_virtual_time(go())


@pytest.mark.parametrize("ended", [False, True])
def test_an_answer_that_nobody_waits_for_any_more_is_let_go(ended: bool):
    """Or Python says, once it has failed, that its error was never retrieved."""
    complaints: list[str] = []

    async def fails(seconds: float) -> None:
        await asyncio.sleep(seconds)
        raise ConnectionError("it is gone")

    async def go() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
        answer = asyncio.ensure_future(fails(0.0 if ended else 2 * LIMIT))
        waiting = asyncio.create_task(answers_within(answer, LIMIT))
        await asyncio.sleep(0)
        if ended:
            await asyncio.wait([answer])
        waiting.cancel()
        await asyncio.wait([waiting])
        del answer, waiting
        await asyncio.sleep(3 * LIMIT)
        gc.collect()

    run_in_virtual_time(go())
    assert complaints == []
