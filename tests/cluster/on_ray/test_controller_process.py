from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from isotherm.cluster.on_ray import controller_process
from isotherm.cluster.on_ray.controller_process import ControllerProcess

TIMEOUT = 20.0  # seconds; only a failing test waits that long


def test_the_loop_goes_on_while_a_controller_is_looked_for(monkeypatch: pytest.MonkeyPatch):
    """The watch over the controller runs on the loop of an ingress replica, which sends tokens meanwhile."""
    back, answers = threading.Event(), []

    async def answer() -> None:
        answers.append(True)

    def find_controller() -> Any:
        assert back.wait(TIMEOUT), "the loop stood still"
        return SimpleNamespace(answer=SimpleNamespace(remote=answer))

    monkeypatch.setattr(controller_process, "find_controller", find_controller)

    async def act() -> None:
        asked = asyncio.ensure_future(ControllerProcess().answer())
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert not asked.done() and not answers
        back.set()
        await asked

    asyncio.run(act())
    assert answers == [True]
