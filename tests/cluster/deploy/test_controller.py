"""The controller's own decisions, over a store that only takes; tests/e2e has it with workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from isotherm.cluster.control import startup
from isotherm.cluster.control.planner import Desired
from isotherm.cluster.deploy import controller as controller_module
from isotherm.cluster.deploy.controller import Controller, Owner
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.model.path import bundled_model


class Store:
    """Of a cluster that no controller has had before."""

    def __init__(self, cluster_id: str) -> None:
        self.generation = -1

    def claim(self) -> int:
        self.generation = 0
        return 0

    def read(self) -> None:
        return None

    def check(self) -> None:
        pass

    def write(self, state: bytes) -> None:
        pass

    def clear(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "StateStore", Store)
    monkeypatch.setattr(controller_module, "set_up_logs", lambda *_: None)


async def made(owner: Owner | None) -> Controller:
    """As Ray makes it."""
    controller = Controller.__new__(Controller)
    await controller.__init__("c", parse_manifest({}), str(bundled_model()), None, owner, None)  # type: ignore[misc]
    return controller


@pytest.mark.parametrize(
    ("owner", "attempts"), [(None, 3), (Owner("here", 1), 1)], ids=["a RayService's", "isotherm serve's"]
)
def test_a_start_that_fails_is_tried_again_where_nobody_waits_for_it(
    owner: Owner | None, attempts: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """`isotherm serve` says what went wrong, and ends; whoever started it decides. Of a RayService nobody waits."""
    monkeypatch.setattr(startup, "PAUSE", 0.001)
    phases: list[str] = []

    async def act() -> None:
        controller = await made(owner)

        async def start_fleet() -> None:
            phases.append(controller._phase)
            if len(phases) < 3:
                raise RuntimeError("no room")

        monkeypatch.setattr(controller, "_start_fleet", start_fleet)
        try:
            if owner is None:
                await controller.start()
            else:
                with pytest.raises(RuntimeError, match="no room"):
                    await controller.start()
                assert controller.not_ready() == "start failed: RuntimeError: no room"
        finally:
            await controller._background.close()

    with caplog.at_level(logging.ERROR):
        asyncio.run(act())
    assert phases == ["starting workers"] * attempts


@pytest.mark.parametrize("victim", ["expert-1", None])
def test_who_dies_late_in_the_start_is_replaced(victim: str | None, monkeypatch: pytest.MonkeyPatch):
    """When links have been made, a death fails nothing any more; and before the cluster serves, nobody is replaced."""
    healed: list[str] = []

    async def act() -> None:
        controller = await made(None)
        revision = controller.revisions.serving

        async def start(planned: Desired, phase: Callable[[str], None]) -> None:
            revision.reconfigurer.desired = planned
            if victim is not None:
                revision.fleet.dead[victim] = "out of memory"
                controller._died(revision.number, victim)
            assert not healed

        monkeypatch.setattr(revision, "start", start)
        monkeypatch.setattr(revision.reconfigurer, "heal", lambda: healed.append(controller._phase))
        monkeypatch.setattr(controller._background, "keep", lambda *_: None)
        try:
            await controller.start()
        finally:
            await controller._background.close()

    asyncio.run(act())
    assert healed == ([] if victim is None else ["serving"])


def test_who_ends_the_cluster_hears_of_it_when_the_start_has_given_its_places_back(monkeypatch: pytest.MonkeyPatch):
    """The controller is killed then, and what is still pending would be demand for ever."""
    given_back: list[bool] = []

    async def act() -> None:
        controller = await made(Owner("here", 1))
        waits = asyncio.Event()

        async def start_fleet() -> None:
            try:
                waits.set()
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.01)
                given_back.append(True)

        monkeypatch.setattr(controller, "_start_fleet", start_fleet)
        await controller.begin()
        await waits.wait()
        await controller.stop()
        assert given_back
        await controller._background.close()

    asyncio.run(act())
