"""Two expert groups as plain objects in this process: one copies what the other holds, as a controller has them do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from native_there import require_native

from isotherm.actors.experts import group as group_module
from isotherm.actors.experts.copy_server import CopyServer
from isotherm.actors.experts.group import ExpertGroup
from isotherm.actors.links.registry import own_locality
from isotherm.cluster.messages.copies import CopySource
from isotherm.cluster.messages.workers import WorkerSpec
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.model.weight_choice import WeightChoice

require_native(ring=True)

SPEC = WorkerSpec(
    id="expert-0",
    model_path=bundled_model(),
    device="cpu",
    dtype="bfloat16",
    weights=WeightChoice(),
    kernels="native",
    threads=1,
    link_timeout=5.0,
    gather_window=1.0,
    copy_from="peer",
)
PAIRS = [(1, 0), (1, 3), (2, 5)]


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # what a worker sets for its process


@pytest.fixture(autouse=True)
def _servers_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group's process ends with it."""
    made: list[CopyServer] = []

    def server(*args) -> CopyServer:
        made.append(CopyServer(*args))
        return made[-1]

    monkeypatch.setattr(group_module, "CopyServer", server)
    yield
    for each in made:
        each.close()


def bits(group: ExpertGroup) -> list[bytes]:
    return [bytes(part) for pair in group.worker.pairs() for part in group.worker.packed(*pair).parts]  # type: ignore[union-attr]


async def copy(one: ExpertGroup, other: ExpertGroup, machine: str) -> CopySource:
    await one.load(PAIRS)
    offer = await one.offer(machine)
    assert offer is not None
    source = CopySource(offer, tuple(PAIRS))
    await other.load(PAIRS, [source])
    assert bits(one) == bits(other) and other.loaded
    return source


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_group_copies_what_another_one_holds(where: str):
    async def act() -> None:
        one, other = (ExpertGroup(replace(SPEC, id=f"expert-{i}"), "127.0.0.1", 8) for i in range(2))
        source = await copy(one, other, own_locality().machine if where == "here" else "another machine")
        assert isinstance(source.offer.address, str) == (where == "here") and source.offer.group == "expert-0"
        status, meter = await other.status(), await other.meter()
        assert status["loaded_from"]["peer"]["experts"] == len(PAIRS) and "checkpoint" not in status["loaded_from"]
        assert status["read_bytes"] == status["weight_bytes"] and status["read_bytes_per_second"] > 0
        assert meter.figures[0].values == {("peer",): len(PAIRS)}
        assert (await one.status())["loaded_from"].keys() == {"checkpoint"}

    asyncio.run(act())


@pytest.mark.parametrize("other", [{"isa": "generic"}, {"dtype": "float32"}, {"weights": WeightChoice(experts="int4")}])
def test_what_another_kind_of_worker_has_packed_is_not_taken(other: dict):
    async def act() -> None:
        one, two = ExpertGroup(SPEC, "127.0.0.1", 8), ExpertGroup(replace(SPEC, **other), "127.0.0.1", 8)
        await one.load(PAIRS)
        offer = await one.offer("another machine")
        assert offer is not None
        await two.load(PAIRS, [CopySource(offer, tuple(PAIRS))])
        assert (await two.status())["loaded_from"].keys() == {"checkpoint"}

    asyncio.run(act())


def test_reference_kernels_offer_nothing():
    group = ExpertGroup(replace(SPEC, kernels="reference"), "127.0.0.1", 8)
    assert asyncio.run(group.offer("")) is None
