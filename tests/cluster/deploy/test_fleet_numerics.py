"""The fleet takes no worker into service that would compute other bits: workers here answer as Ray actors do, without
Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from isotherm.cluster.deploy import fleet as fleet_module
from isotherm.cluster.deploy import places
from isotherm.cluster.deploy.fleet import RayFleet
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.fingerprint import Fingerprint, NumericsError
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.on_ray.workers import RayWorker, Slot

LIKE = Fingerprint("0123456789abcdef", "bfloat16", "stored", "cpu", "native", 1, "avx512_bf16")
UNLIKE = replace(LIKE, instructions="avx2")


class Call:
    """A method of an actor: `.remote(…)` gives an awaitable."""

    def __init__(self, answer: Callable[..., Any]):
        self._answer = answer

    async def remote(self, *args: Any) -> Any:
        return self._answer(*args)


class Forever(Call):
    async def remote(self, *args: Any) -> Any:
        await asyncio.Event().wait()


class FakeActor:
    def __init__(self, fingerprint: Fingerprint, orders: list[str]):
        self.fingerprint = Call(lambda: fingerprint)
        self.order = Call(lambda generation, name, *_: orders.append(name))
        self.sentinel = Forever(lambda: None)
        self.answer = self.sentinel


class Machines:
    """`kinds` says what a worker computes by; `orders` what each was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kinds: dict[str, Fingerprint]):
        self.orders: dict[str, list[str]] = {}

        async def reserve(name: str, *_: Any) -> Slot:
            return Slot(object(), "node", "127.0.0.1")

        def start_worker(name: str, *_: Any) -> RayWorker:
            return RayWorker(
                name,
                Slot(object(), "node", "127.0.0.1"),
                FakeActor(kinds.get(name, LIKE), self.orders.setdefault(name, [])),
            )

        monkeypatch.setattr(places, "reserve", reserve)
        monkeypatch.setattr(fleet_module, "start_worker", start_worker)
        monkeypatch.setattr(
            fleet_module, "end_worker", lambda worker: self.orders.setdefault(worker.id, []).append("end")
        )


def fleet(mixed: str = "refuse") -> RayFleet:
    manifest = parse_manifest({"mixed": mixed, "liveness": {"timeout": 0}})
    checkpoint = Checkpoint.open(bundled_model())
    return RayFleet("test", 1, manifest, checkpoint, lambda _: None, lambda: None, lambda: None)


def test_every_worker_is_told_how_the_kv_cache_is_kept():
    """Expert groups too, for all have one fingerprint."""
    manifest = parse_manifest({"engine": {"kv_cache_dtype": "fp8"}})
    some = RayFleet("test", 1, manifest, Checkpoint.open(bundled_model()), lambda _: None, lambda: None, lambda: None)
    assert some._spec("expert-0", None, 0).kv_cache_dtype == "fp8" and fleet()._spec("a", 1, 0).kv_cache_dtype == "auto"


@pytest.mark.parametrize("odd", ["expert-1", "attention-1"])
def test_a_worker_that_differs_is_refused_when_it_is_started(monkeypatch: pytest.MonkeyPatch, odd: str):
    machines = Machines(monkeypatch, {odd: UNLIKE})

    async def go() -> None:
        workers = fleet()
        await workers.start_shard("attention-0")
        await workers.start_group("expert-0")
        start = workers.start_group if odd.startswith("expert") else workers.start_shard
        with pytest.raises(NumericsError, match=f"^{odd} is refused.*instruction set avx2, not avx512_bf16"):
            await start(odd)
        assert workers.numerics.system_fingerprint == LIKE.digest
        assert "load" not in machines.orders[odd], "no weights are loaded in vain"
        await workers.end(odd)  # as an operation that is rolled back does
        assert machines.orders[odd][-1] == "end" and odd not in [*workers.groups, *workers.shards]
        await workers.end_all()

    asyncio.run(go())


def test_a_replacement_is_held_to_what_was_written_down(monkeypatch: pytest.MonkeyPatch):
    """Of a controller that came back and found nobody to ask."""
    Machines(monkeypatch, {"attention-7": UNLIKE})

    async def go() -> None:
        before, after = fleet(), fleet()
        await before.start_shard("attention-0")
        after.numerics.restore(before.numerics.dump())
        with pytest.raises(NumericsError, match=r"^attention-7 is refused"):
            await after.start_shard("attention-7")
        for workers in (before, after):
            await workers.end_all()

    asyncio.run(go())


def test_mixed_workers_serve_where_the_manifest_allows_it(monkeypatch: pytest.MonkeyPatch):
    Machines(monkeypatch, {"expert-1": UNLIKE})

    async def go() -> None:
        workers = fleet("allow")
        for start, name in ((workers.start_shard, "attention-0"), (workers.start_group, "expert-1")):
            await start(name)
        assert workers.numerics.system_fingerprint.endswith("-mixed")
        await workers.end_all()

    asyncio.run(go())
