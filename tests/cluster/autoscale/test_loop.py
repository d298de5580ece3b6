"""The autoscaler's loop over a simulated cluster: it meters, evens out heat by operations, advises, waits its turn and
gives up when it must."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from deepseek_checkpoints import make_config
from virtual_time import run_in_virtual_time

from isotherm.cluster.autoscale.autoscaler import GROUPS, Decision
from isotherm.cluster.autoscale.loop import REMEMBERED, AutoscaleLoop
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.messages.meters import GroupMeter, ShardMeter
from isotherm.cluster.messages.operations import AUTOSCALER, Operation, OperationLog, OperationRequest, Phase, Target
from isotherm.cluster.model.registry import parse
from isotherm.cluster.placement.report import group_rows
from isotherm.cluster.placement.table import Placement, contiguous_placement

LAYERS, EXPERTS = 4, 32
MODEL = parse(make_config({"num_hidden_layers": LAYERS + 1, "first_k_dense_replace": 1, "n_routed_experts": EXPERTS}))
ZIPF = 1.0 / np.arange(1, EXPERTS + 1) ** 1.2
BYTES = 100  # of an expert's weights


class Simulation:
    """Groups and shards as numbers. Between two looks `steps` steps route `rows` rows of each layer by `popularity` [L,
    E]."""

    def __init__(self, groups: int = 2, manifest: dict[str, Any] | None = None, rows: int = 2000, saved: str = ""):
        self.manifest = parse_manifest(manifest or {})
        self.group_names = [f"expert-{i}" for i in range(groups)]
        self.placement = contiguous_placement(MODEL.moe_layers, EXPERTS, self.group_names)
        self.popularity = np.tile(ZIPF / ZIPF.sum(), (LAYERS, 1))
        self.rows, self.steps, self.now, self.busy = rows, 1, 0.0, 0.5
        self.random = np.random.default_rng(0)
        self.routed, self.reads = (
            np.zeros((LAYERS, EXPERTS), dtype=np.int64),
            np.zeros((LAYERS, EXPERTS), dtype=np.int64),
        )
        self.served, self.busy_seconds = dict.fromkeys(self.group_names, 0.0), 0.0
        self.silent: set[str] = set()
        self.pins: set[Pair] = set()
        self.dead = False
        self.fail = ""
        self.most_held = 0
        self.operations = OperationLog()
        self.ends: dict[str, asyncio.Future[None]] = {}
        self.requests: list[OperationRequest] = []
        self.saves = 0
        self.loop = AutoscaleLoop(self.manifest, MODEL, self, self, self.operations, lambda: self.now, self.save, saved)

    def save(self) -> None:
        self.saves += 1

    # MeteredFleet

    def nodes(self) -> tuple[dict[str, str], dict[str, str]]:
        return dict.fromkeys(self.group_names, "node"), {"attention-0": "node"}

    def all_alive(self) -> bool:
        return not self.dead

    async def meters(self) -> tuple[dict[str, ShardMeter], dict[str, GroupMeter]]:
        shard = ShardMeter(4, 0, 128, 0.2, 0, 0, 0.1, 0.0, {}, self.routed.copy(), self.reads.copy())
        held = {g: len(self.placement.held_by(g)) for g in self.group_names}
        groups = {
            g: GroupMeter(0, 1, int(self.served[g]), self.busy_seconds, 0.0, held[g], held[g] * BYTES)
            for g in self.group_names
        }
        return {"attention-0": shard}, {g: m for g, m in groups.items() if g not in self.silent}

    # Reconfigures

    def pinned(self) -> set[Pair]:
        return self.pins

    def rebalance(self, placement: Placement, reason: str) -> Operation:
        operation, _ = self.operations.open(OperationRequest(Target(), "", False, 60.0), self.now, AUTOSCALER)
        operation.reasons.append(reason)
        before = self.placement
        both = {g: len(set(before.held_by(g)) | set(placement.held_by(g))) for g in self.group_names}
        self.most_held = max(self.most_held, *both.values())
        self._end(operation, lambda: setattr(self, "placement", placement))
        return operation

    def submit(self, request: OperationRequest, origin: str) -> Operation:
        operation, _ = self.operations.open(request, self.now, origin)
        self.requests.append(request)
        self._end(operation, lambda: None)
        return operation

    async def ended(self, operation: Operation) -> Operation:
        await self.ends.pop(operation.id)
        return operation

    def _end(self, operation: Operation, act) -> None:
        async def end() -> None:
            await asyncio.sleep(0.01)
            if self.fail:
                operation.enter(Phase.ROLLED_BACK, self.now, self.fail)
            else:
                act()
                operation.enter(Phase.DONE, self.now)

        self.ends[operation.id] = asyncio.ensure_future(end())

    # time

    def traffic(self, seconds: float) -> None:
        counts = np.stack([self.random.multinomial(self.rows, p) for p in self.popularity])
        self.routed += counts
        self.reads += np.minimum(counts, self.steps)
        for group, rows in group_rows(self.placement, counts.astype(float)).items():
            self.served[group] += rows
        self.busy_seconds += self.busy * seconds
        self.now += seconds

    def heat(self) -> float:
        rows = group_rows(self.placement, self.popularity)
        return max(rows.values()) / (sum(rows.values()) / len(self.group_names))

    def run(self, seconds: float) -> list[float]:
        """The heat after each look; operations end between two looks."""

        async def looks() -> list[float]:
            heats = []
            end = self.now + seconds
            while self.now < end:
                self.traffic(self.manifest.autoscaling.interval)
                await self.loop.look()
                while self.loop.report()["acting"]:
                    await asyncio.sleep(0.01)
                heats.append(self.heat())
            return heats

        return run_in_virtual_time(looks())


def done(simulation: Simulation, kind: str = "copies") -> list[dict[str, Any]]:
    return [d for d in simulation.loop.decisions if d["kind"] == kind and d["result"] == "done"]


def test_heat_evens_out_by_itself_and_then_nothing_moves():
    s = Simulation()
    assert s.heat() > 1.5
    heats = s.run(30)
    assert heats[-1] < 1.1
    version = s.placement.version
    s.run(300)
    assert s.placement.version == version, [d["reason"] for d in s.loop.decisions]
    decision = done(s)[0]
    assert (
        decision["mode"] == "on"
        and decision["figures"]["imbalance"] > 1.5
        and decision["operations"] == [s.operations.all()[0].id]
    )
    assert all(o.origin == AUTOSCALER and "hottest group" in o.reasons[0] for o in s.operations.all())


def test_the_placement_follows_a_shift():
    s = Simulation(groups=4)
    s.run(60)
    assert s.heat() < 1.15
    s.popularity = s.popularity[:, np.random.default_rng(1).permutation(EXPERTS)]
    before = s.heat()
    heats = s.run(60)
    assert heats[-1] < min(1.2, before)
    version = s.placement.version
    s.run(240)
    assert s.placement.version == version


def test_with_few_rows_what_counts_is_how_often_weights_are_read():
    """All experts are in every step: two copies of one would only be read twice."""
    s = Simulation(manifest={"autoscaling": {"copies": {"read_cost": 1000.0}}})
    s.steps = 1
    s.run(60)
    assert all(len(held) == 1 for row in s.placement.holders for held in row)
    dense = Simulation()
    dense.run(60)
    assert any(len(held) == 2 for row in dense.placement.holders for held in row)


def test_slots_and_the_memory_in_between_are_kept_to():
    s = Simulation(manifest={"experts": {"spare_slots": 6}, "autoscaling": {"copies": {"max_loads": 1.0}}})
    s.run(60)
    share = LAYERS * EXPERTS // 2
    held = [len(s.placement.held_by(g)) for g in s.group_names]
    assert max(held) <= share + 6 and s.heat() < 1.15
    assert s.most_held <= share + 6 + share // 10 + 1


def test_without_spare_slots_experts_are_exchanged():
    s = Simulation(manifest={"experts": {"spare_slots": 0}})
    s.run(60)
    assert s.heat() < 1.15 and {len(s.placement.held_by(g)) for g in s.group_names} == {LAYERS * EXPERTS // 2}


def test_slots_are_those_of_the_workers_that_serve_by_now():
    """Which may have been started with another manifest."""
    s = Simulation(manifest={"experts": {"spare_slots": 0}})
    s.loop.follow(parse_manifest({"experts": {"spare_slots": 6, "memory": 1 << 30}}), s, s)
    s.run(60)
    assert max(len(s.placement.held_by(g)) for g in s.group_names) > LAYERS * EXPERTS // 2
    assert s.loop._autoscaler.limits.group_memory == 1 << 30


def test_memory_bounds_the_slots():
    share = LAYERS * EXPERTS // 2
    s = Simulation(
        manifest={
            "experts": {"spare_slots": 64, "memory": (share + 10) * BYTES},
            "autoscaling": {"copies": {"max_loads": 1.0}},
        }
    )
    s.run(60)
    assert s.most_held <= share + 10 and s.heat() < 1.3


def test_advise_only_writes_it_down_and_once():
    s = Simulation(manifest={"autoscaling": {"mode": "advise", "expert_groups": {"max": 4}}})
    s.busy = 0.95
    s.run(240)
    assert s.placement.version == 1 and not s.operations.all()
    assert sorted(d["kind"] for d in s.loop.decisions) == ["copies", "expert_groups"]
    for decision in s.loop.decisions:
        assert decision["result"] == "advised" and decision["again"] > 0 and decision["operations"] == []


def test_off_still_meters():
    s = Simulation(manifest={"autoscaling": {"mode": False}})
    s.run(30)
    assert not s.loop.decisions and s.placement.version == 1
    rates = s.loop.load_view()
    assert rates is not None and rates[0][0] > rates[0][5] > 0
    assert [g["busy"] for g in s.loop.report()["groups"]] == pytest.approx([0.5, 0.5])


def test_it_waits_while_somebody_else_changes_the_cluster():
    s = Simulation()
    operation, _ = s.operations.open(OperationRequest(Target(expert_groups=3), "", False, 60.0), 0.0)
    s.run(20)
    assert not s.loop.decisions
    operation.enter(Phase.DONE, s.now)
    s.dead = True
    s.run(20)
    assert not s.loop.decisions
    s.dead = False
    s.run(20)
    assert done(s)


def test_heat_evens_out_while_new_workers_wait_for_a_node():
    s = Simulation(manifest={"autoscaling": {"expert_groups": {"max": 4}, "attention_shards": {"max": 4}}})
    s.busy = 0.95
    waiting, _ = s.operations.open(OperationRequest(Target(expert_groups=3), "", False, 900.0), 0.0, AUTOSCALER)
    waiting.waiting = True
    s.run(60)
    assert s.heat() < 1.1 and {d["kind"] for d in s.loop.decisions} == {"copies"}
    waiting.enter(Phase.ROLLED_BACK, s.now)
    s.run(30)
    assert s.requests[0].target.expert_groups == 4


def test_what_fails_is_written_down_and_tried_later_and_later():
    s = Simulation()
    s.fail = "no memory"
    s.run(100)
    failures = [d for d in s.loop.decisions if d["result"] == "failed"]
    assert 2 <= len(failures) <= 5 and "no memory" in failures[0]["why"] and s.placement.version == 1
    s.fail = ""
    s.run(200)
    assert done(s) and s.heat() < 1.1


def test_an_operators_copies_stay_until_they_are_handed_back():
    s = Simulation(manifest={"experts": {"spare_slots": 1}})
    s.run(60)
    coldest = EXPERTS - 1
    layer = s.placement.layers[0]
    s.pins = {(layer, coldest)}
    holders = [list(row) for row in s.placement.holders]
    holders[0][coldest] = tuple(s.group_names)
    s.placement = Placement(s.placement.version + 1, s.placement.layers, tuple(map(tuple, holders)))
    s.popularity = s.popularity[:, ::-1].copy()
    s.popularity[:, coldest] = 0
    s.popularity /= s.popularity.sum(axis=1, keepdims=True)
    version = s.placement.version
    s.run(60)
    assert s.placement.version > version and set(s.placement.holders[0][coldest]) == set(s.group_names)
    s.pins = set()
    for _ in range(3):  # its slots are wanted for others
        s.popularity = s.random.permuted(np.tile(ZIPF / ZIPF.sum(), (LAYERS, 1)), axis=1)
        s.run(60)
    assert len(s.placement.holders[0][coldest]) == 1


def test_decisions_and_pauses_outlive_the_controller():
    s = Simulation(manifest={"autoscaling": {"copies": {"cooldown": 1000.0}}})
    s.run(30)
    assert len(done(s)) == 1 and s.saves == 2
    s.loop._record(Decision(GROUPS, "more", {}, 3))
    before = s.loop.report()["decisions"]
    back = Simulation(manifest={"autoscaling": {"copies": {"cooldown": 1000.0}}}, saved=s.loop.dump())
    decisions = back.loop.report()["decisions"]
    assert decisions[:-1] == before[:-1] and (decisions[-1]["result"], decisions[-1]["why"]) == (
        "interrupted",
        "the controller was restarted",
    )
    assert back.loop.counts == {("copies", "done"): 1, ("expert_groups", "interrupted"): 1} and back.saves == 0
    back.run(60)
    assert back.heat() > 1.5 and len(back.loop.decisions) == 2  # it still pauses
    fresh = Simulation(manifest={"autoscaling": {"copies": {"cooldown": 1000.0}}})
    fresh.run(60)
    assert fresh.heat() < 1.2


def test_an_operators_mode_outlives_the_controller():
    """It is saved at once. Where it is the manifest's own, nothing is: then the manifest's holds, also a later one."""
    s = Simulation()
    s.loop.set_mode("off")
    s.run(30)
    assert s.saves == 1 and not s.loop.decisions
    back = Simulation(saved=s.loop.dump())
    back.run(30)
    assert back.loop.report()["mode"] == back.loop.summary()["mode"] == "off" and not back.loop.decisions
    back.loop.set_mode("advise")
    again = Simulation(saved=back.loop.dump())
    again.run(30)
    assert {d["result"] for d in again.loop.decisions} == {"advised"} and again.placement.version == 1
    again.loop.set_mode("on")
    assert Simulation(saved=again.loop.dump()).loop.mode == "on"
    assert Simulation(manifest={"autoscaling": {"mode": "advise"}}, saved=again.loop.dump()).loop.mode == "advise"


def turned_off_at(number: int) -> tuple[Simulation, list[int]]:
    """By an operator while plan `number` is made; and how many decisions there were before each plan."""
    s, known = Simulation(), list[int]()
    make_plan = s.loop._make_plan

    def plan(*given: Any) -> Any:
        known.append(len(s.loop.decisions))
        if len(known) == number:
            s.loop.set_mode("off")
        return make_plan(*given)

    s.loop._make_plan = plan  # type: ignore[method-assign]
    s.run(30)
    return s, known


def test_an_operator_who_turns_it_off_while_it_makes_up_its_mind():
    s, known = turned_off_at(0)
    assert s.loop.decisions
    followed = known.index(1)  # plans were made before the one after the first decision: it came of the last of them
    s, known = turned_off_at(followed)
    assert len(known) == followed and s.loop.mode == "off"
    assert not s.loop.decisions and not s.operations.all() and s.placement.version == 1


def test_what_is_saved_is_bounded():
    s = Simulation()
    for i in range(5 * REMEMBERED):
        s.loop._settle(
            s.loop._record(
                Decision(GROUPS, "groups compute 95% of the time (above 80%), for 15 s: 2 → 3", {"busy": i / 3}, 3)
            ),
            "done",
        )
    saved = s.loop.dump()
    assert len(json.loads(saved)["decisions"]) == REMEMBERED and len(saved) < 64 << 10
    back = Simulation(saved=saved)
    assert (
        back.loop.report()["decisions"] == s.loop.report()["decisions"]
        and json.loads(back.loop.dump()).keys() == json.loads(saved).keys()
    )


def test_groups_are_asked_for_with_the_patience_of_the_manifest():
    s = Simulation(manifest={"autoscaling": {"expert_groups": {"max": 4}, "patience": 77.0}})
    s.busy = 0.95
    s.run(60)
    assert s.requests and s.requests[0].target.expert_groups == 4 and s.requests[0].deadline_seconds == 77.0


def test_slow_workers_are_no_reason_to_stop():
    s = Simulation(groups=3)
    s.silent.add("expert-2")
    s.run(40)
    assert s.heat() < 1.2
    assert [g["name"] for g in s.loop.report()["groups"]] == ["expert-0", "expert-1"]


def test_nothing_is_done_without_traffic():
    s = Simulation(rows=0)
    s.run(60)
    assert not s.loop.decisions and s.loop.load_view() is None
