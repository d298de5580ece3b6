"""A process stands ready on each node that has workers, and another one once it was used."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from virtual_time import run_in_virtual_time

from isotherm.cluster.control.spares import LASTING_SECONDS, QUIET_SECONDS, Spares


class Nodes:
    """When a process was begun on which node; `gone`: nodes that are no more; `away`: how often a node does not
    answer."""

    def __init__(self, gone: tuple[str, ...] = (), away: int = 0):
        self.began: list[tuple[str, float]] = []
        self.gone, self.away = gone, away

    async def start(self, node: str, seconds: float) -> bool:
        assert seconds == LASTING_SECONDS
        if self.away:
            self.away -= 1
            raise ConnectionError("the raylet does not answer")
        self.began.append((node, round(asyncio.get_running_loop().time(), 1)))
        return node not in self.gone


def play(nodes: Nodes, act: Callable[[Spares], Awaitable[None]]) -> list[tuple[str, float]]:
    async def run() -> None:
        begin = asyncio.get_running_loop().time()
        spares = Spares(nodes.start)
        await act(spares)
        spares.close()
        await asyncio.sleep(2 * LASTING_SECONDS)
        nodes.began[:] = [(node, round(at - begin, 1)) for node, at in nodes.began]

    run_in_virtual_time(run())
    return nodes.began


def test_one_for_each_node_once_it_is_quiet_there():
    async def act(spares: Spares) -> None:
        for _ in range(4):
            spares.used("a")
            await asyncio.sleep(1)
        spares.used("b")
        await asyncio.sleep(60)
        spares.used("a")
        await asyncio.sleep(60)

    # a was used again while it waited, and so waits once more
    assert play(Nodes(), act) == [("b", 4 + QUIET_SECONDS), ("a", 2 * QUIET_SECONDS), ("a", 64 + QUIET_SECONDS)]


def test_a_new_one_before_the_old_one_may_end():
    async def act(spares: Spares) -> None:
        spares.used("a")
        await asyncio.sleep(2.5 * LASTING_SECONDS)

    assert [at for _, at in play(Nodes(), act)] == [QUIET_SECONDS + i * LASTING_SECONDS for i in range(3)]


def test_none_on_a_node_that_is_gone_until_it_is_used_again():
    async def act(spares: Spares) -> None:
        spares.used("a")
        await asyncio.sleep(3 * LASTING_SECONDS)
        spares.used("a")
        await asyncio.sleep(60)

    assert len(play(Nodes(gone=("a",)), act)) == 2


def test_a_node_that_does_not_answer_is_asked_again():
    async def act(spares: Spares) -> None:
        spares.used("a")
        await asyncio.sleep(60)

    assert len(play(Nodes(away=3), act)) == 1


def test_who_is_closed_as_a_process_is_used_makes_no_other_ready():
    async def act(spares: Spares) -> None:
        spares.used("a")
        await asyncio.sleep(60)
        spares.used("a")
        spares.close()

    assert play(Nodes(), act) == [("a", QUIET_SECONDS)]
