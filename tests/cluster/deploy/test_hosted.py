"""The worker actors' classes as Ray has them: the methods of what they host, and PyTorch nowhere but there."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys

import pytest

from isotherm.cluster.deploy.hosted import AttentionShard, ExpertGroup, Hosted

IMPORTED_ELSEWHERE = ("serve", "controller", "ingress", "hosted")


@pytest.mark.parametrize("actor", [AttentionShard, ExpertGroup])
def test_each_method_is_that_of_what_is_hosted(actor: type[Hosted]):
    hosted = actor.implementation()
    assert hosted.__name__ == actor.__name__ and hosted is not actor
    for name in (*actor.common, *actor.methods):
        assert inspect.iscoroutinefunction(getattr(hosted, name)), name
        assert inspect.iscoroutinefunction(getattr(actor, name)) and getattr(actor, name).__name__ == name
    assert list(inspect.signature(actor).parameters) == list(inspect.signature(hosted).parameters)
    assert hasattr(actor, "stream") == hasattr(hosted, "stream")


class Echo:
    def __init__(self, *args: object):
        self.made_of = args
        self.closed = False

    async def order(self, *args: object) -> object:
        return self.made_of, args

    async def stream(self, connection: str):
        try:
            for i in range(9):
                yield [connection, i]
        finally:
            self.closed = True


class Host(AttentionShard):
    @staticmethod
    def implementation() -> type:
        return Echo


def test_calls_and_streams_go_through():
    host = Host("spec", "10.0.0.1", "scheduler")

    async def use() -> list[object]:
        assert await host.order(3, "load", "x") == (("spec", "10.0.0.1", "scheduler"), (3, "load", "x"))
        stream, first = host.stream("one"), []
        async for item in stream:
            first.append(item)
            if len(first) == 2:
                break
        await stream.aclose()
        return first

    assert asyncio.run(use()) == [["one", 0], ["one", 1]]
    assert host.hosted.closed  # at once: what it reads from is not left to the collector


@pytest.mark.parametrize("module", IMPORTED_ELSEWHERE)
def test_who_starts_or_finds_an_actor_imports_no_pytorch(module: str):
    """Ray imports an actor's class wherever the actor is found: in each ingress replica, and for each command."""
    code = f"import sys, isotherm.cluster.deploy.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.stdout == "False\n", done
