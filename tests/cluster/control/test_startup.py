"""A cluster is started as a whole, or nothing of it is left; under KubeRay it is tried again."""

from __future__ import annotations

import asyncio

import pytest
from table_fleet import EXPERTS, LAYERS, TableFleet

from isotherm.cluster.control import startup
from isotherm.cluster.control.planner import Desired
from isotherm.cluster.control.startup import start_again_and_again, start_fleet
from isotherm.cluster.placement.table import contiguous_placement

GROUPS, SHARDS = ("expert-0", "expert-1"), ("attention-0", "attention-1")


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(startup, "PAUSE", 0.002)
    monkeypatch.setattr(startup, "LONGEST_PAUSE", 0.008)
    monkeypatch.setattr(startup, "PLACES_SECONDS", 0.05)


def empty() -> TableFleet:
    fleet = TableFleet(GROUPS, ())
    fleet.experts.clear()
    fleet.links.clear()
    return fleet


async def start(fleet: TableFleet, phases: list[str]) -> None:
    placement = contiguous_placement(LAYERS, EXPERTS, GROUPS)
    await start_fleet(fleet, SHARDS, GROUPS, placement, phases.append)
    fleet.committed(Desired(GROUPS, SHARDS, placement))


def test_every_worker_is_started_linked_and_given_its_experts():
    fleet, phases = empty(), []
    asyncio.run(start(fleet, phases))
    fleet.check()
    assert phases == ["linking workers"]


@pytest.mark.parametrize(
    "what", ["start expert-1", "start attention-0", "load expert-0", "link attention-1 expert-0", "adopt attention-0"]
)
def test_nothing_is_left_of_a_start_that_fails(what: str):
    fleet = empty()
    fleet.fails.add(what)
    with pytest.raises(RuntimeError, match=f"{what} does not work"):
        asyncio.run(start(fleet, []))
    assert not fleet.experts and not fleet.routes and not fleet.places and not fleet.links


def test_who_waits_for_a_place_is_given_up_where_another_fails():
    fleet = empty()
    fleet.full = True  # for groups
    fleet.fails.add("start attention-0")
    with pytest.raises(RuntimeError, match="start attention-0"):
        asyncio.run(start(fleet, []))
    assert not fleet.experts and not fleet.routes and not fleet.places


def test_a_start_is_tried_again_until_it_succeeds():
    """As under KubeRay, which would restart the pod in vain."""
    fleet, phases = empty(), []
    fleet.fails.add("load expert-0")
    attempts = []

    async def attempt() -> None:
        attempts.append(len(attempts))
        if len(attempts) == 4:
            fleet.fails.clear()
        await start(fleet, phases)

    asyncio.run(start_again_and_again(attempt, phases.append, retry=True))
    fleet.check()
    failed = [phase for phase in phases if "failed" in phase]
    why = "start failed: RuntimeError: load expert-0 does not work"
    assert failed == [f"{why}; tried again in {pause:g} s" for pause in (0.002, 0.004, 0.008)]


@pytest.mark.parametrize("losses", [1, 2, 3])
def test_a_worker_that_is_lost_in_a_start_that_somebody_waits_for_costs_some_tries(losses: int):
    phases: list[str] = []
    ends: list[Exception | None] = [ConnectionError("killed")] * losses

    async def attempt() -> None:
        if ends:
            raise ends.pop()

    def lost(error: Exception) -> bool:
        return isinstance(error, ConnectionError)

    work = start_again_and_again(attempt, phases.append, retry=False, lost=lost)
    if losses == 3:
        with pytest.raises(ConnectionError):
            asyncio.run(work)
    else:
        asyncio.run(work)
    assert phases.count("starting workers") == min(losses + 1, 3) and not ends


def test_a_start_that_somebody_waits_for_is_not_tried_again():
    phases: list[str] = []

    async def attempt() -> None:
        raise ValueError("ray::Shard.load()\n  File x, line 1\nKeyError: what went wrong")

    with pytest.raises(ValueError, match="load"):
        asyncio.run(start_again_and_again(attempt, phases.append, retry=False))
    assert phases == ["starting workers", "start failed: ValueError: KeyError: what went wrong"]
