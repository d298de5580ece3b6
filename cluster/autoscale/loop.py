"""The controller's loop around the autoscaler: ask the workers for their load, keep the decayed view, decide, and act
by operations.

Acts only through Reconfigurer, one change at a time; what is decided is in cluster/autoscale/autoscaler.py and
cluster/placement/policy.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, replace
from typing import Protocol

import numpy as np

from isotherm.cluster.autoscale.autoscaler import COPIES, GROUPS, SHARDS, Autoscaler, Decision, Limits, Observation
from isotherm.cluster.autoscale.forecast import LoadView, predict
from isotherm.cluster.autoscale.rates import GroupLoad, Meters, ShardLoad
from isotherm.cluster.background import Background
from isotherm.cluster.errors import named_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.messages.figures import Figures
from isotherm.cluster.messages.meters import GroupMeter, ShardMeter
from isotherm.cluster.messages.operations import (
    AUTOSCALER,
    AutoscalerMode,
    Operation,
    OperationError,
    OperationLog,
    OperationRequest,
    Origin,
    Phase,
    PlacementChangeError,
    Target,
)
from isotherm.cluster.model.config import ModelConfig
from isotherm.cluster.placement.policy import Group, Plan, PolicyConfig, rebalance, replay, stages
from isotherm.cluster.placement.table import Placement

log = logging.getLogger(__name__)
REMEMBERED = 100  # decisions
SILENCE = 15.0  # seconds after which what a worker said last no longer counts
TRANSIENT = 10  # while experts are exchanged, a group may hold this fraction (a tenth) of its share beyond its slots


class MeteredFleet(Protocol):
    """What the loop needs of the workers."""

    placement: Placement

    def nodes(self) -> tuple[dict[str, str], dict[str, str]]:
        """Node of each live group, and of each live shard."""

    def all_alive(self) -> bool: ...

    async def meters(self) -> tuple[dict[str, ShardMeter], dict[str, GroupMeter]]:
        """What the shards and groups report that answer in time."""


class Reconfigures(Protocol):
    def submit(self, request: OperationRequest, origin: Origin) -> Operation: ...

    def rebalance(self, placement: Placement, reason: str) -> Operation: ...

    async def ended(self, operation: Operation) -> Operation:
        """The operation when it has ended."""

    def pinned(self) -> Set[Pair]:
        """Experts whose number of copies an operator has set."""


class AutoscaleLoop:
    """`clock` gives seconds; the time of day is only written down. `decided` is called when there is something new to
    save: what `dump` gives. `saved`: what it gave the controller before this one."""

    def __init__(
        self,
        manifest: Manifest,
        model: ModelConfig,
        fleet: MeteredFleet,
        reconfigurer: Reconfigures,
        operations: OperationLog,
        clock: Callable[[], float] = time.monotonic,
        decided: Callable[[], None] = lambda: None,
        saved: str = "",
    ):
        self.config = manifest.autoscaling
        self.mode: AutoscalerMode = self.config.mode  # what the manifest says, until an operator says otherwise
        # Is told what the workers' meters say, and when
        self.metered: Callable[[dict[str, ShardMeter], dict[str, GroupMeter], float], None] = lambda *_: None
        self._manifest, self._fleet, self._reconfigurer = manifest, fleet, reconfigurer
        self._operations, self._clock = operations, clock
        self._autoscaler = Autoscaler(Limits.of(manifest, bool(model.moe_layers)))
        self._policy = PolicyConfig(max_moves=self.config.copies.max_loads)
        size = len(model.moe_layers), model.n_routed_experts if model.moe_layers else 0
        half_life = self.config.half_life
        self.rows, self._reads = (LoadView(*size, half_life=half_life, window=half_life / 2) for _ in range(2))
        self._meters = Meters(half_life, max(SILENCE, 4 * self.config.interval))
        self.decisions: deque[JSON] = deque(maxlen=REMEMBERED)
        self.counts: dict[tuple[str, str], int] = {}  # (kind, what became of it) → how often
        self._plan: Plan | None = None
        self._background = Background()
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by kind of decision
        self._decided: Callable[[], None] = lambda: None
        if saved:
            self._load(saved)
        self._decided = decided

    def follow(self, manifest: Manifest, fleet: MeteredFleet, reconfigurer: Reconfigures) -> None:
        """Look at these workers from now on, which serve in the place of the others, with the values that this manifest
        has for them; its `autoscaling` is as it was."""
        self._manifest, self._fleet, self._reconfigurer = manifest, fleet, reconfigurer
        self._autoscaler.limits = replace(self._autoscaler.limits, group_memory=manifest.experts.memory)

    # --- looking ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look again and again. A look that fails is logged, and the next one comes."""
        log.info("autoscaling is %s", self.mode)
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("the autoscaler could not look at the load")
            await asyncio.sleep(self.config.interval)

    async def look(self) -> None:
        """One turn: meter, and where nothing else goes on, decide. While new workers wait for a node, copies alone are
        decided about."""
        shards, groups = await self._fleet.meters()
        now = self._clock()
        self._meters.observe(shards, groups, now)
        self.metered(shards, groups, now)
        self.rows.observe({name: meter.rows_routed for name, meter in shards.items()}, now)
        self._reads.observe({name: meter.reads for name, meter in shards.items()}, now)
        if not self._has_turn():
            return
        observation = await self._observe(now)
        if not self._has_turn():  # an operator has turned it off meanwhile, or has begun something
            return
        scaling = self._tasks or self._operations.waiting() is not None
        decision = self._autoscaler.decide(observation, (COPIES,) if scaling else (GROUPS, SHARDS, COPIES))
        if decision is None:
            return
        if self.mode == "advise":
            self._advise(decision)
            self._autoscaler.succeeded(decision, now)
        else:
            work = self._carry_out(decision, self._record(decision))
            self._tasks[decision.kind] = self._background.spawn(f"the autoscaler's change of {decision.kind}", work)

    def _has_turn(self) -> bool:
        """Whether it may act, and nobody else does."""
        idle = COPIES not in self._tasks and self._operations.running() is None
        return self.mode != "off" and idle and self._fleet.all_alive()

    async def _observe(self, now: float) -> Observation:
        group_nodes, shard_nodes = self._fleet.nodes()
        groups = tuple(self._meters.groups(group_nodes, shard_nodes))
        shards = tuple(self._meters.shards(shard_nodes))
        self._plan = None
        windows = self._work()
        if self.config.copies.enabled and len(group_nodes) > 1 and windows is not None:
            # Off the event loop: for hundreds of groups a plan takes up to a second.
            room = self._room(group_nodes, groups)
            self._plan = await asyncio.to_thread(
                self._make_plan, self._fleet.placement, room, windows, self._reconfigurer.pinned()
            )
        return Observation(now, groups, shards, len(group_nodes), len(shard_nodes), self._plan)

    def _work(self) -> np.ndarray | None:
        """The past load [windows, layers, experts], in rows; None: nothing is known. A read of an expert's weights
        counts as `read_cost` rows, for with few rows that is what takes the time; scaled to the number of rows, by
        which the policy knows how far to trust the figures."""
        rows_WLE, reads_WLE = self.rows.windows(), self._reads.windows()
        if not len(rows_WLE) or not rows_WLE[-1].any():
            return None
        work_WLE: np.ndarray = rows_WLE + self.config.copies.read_cost * reads_WLE[-len(rows_WLE) :]
        scale_WL1 = rows_WLE.sum(axis=2, keepdims=True) / np.maximum(work_WLE.sum(axis=2, keepdims=True), 1e-9)
        work_WLE *= scale_WL1
        return work_WLE

    def _make_plan(
        self, placement: Placement, groups: Sequence[Group], windows_WLE: np.ndarray, pinned: Set[Pair]
    ) -> Plan:
        return rebalance(placement, groups, predict(windows_WLE), self._policy, pinned=pinned)

    def _room(self, nodes: Mapping[str, str], groups: Sequence[GroupLoad]) -> list[Group]:
        """Each group's slots over all layers: its share and the spare ones, as far as `experts.memory` allows, where
        that is given."""
        slots = self._manifest.group_slots(self._fleet.placement.experts, len(nodes))
        sizes = [g.weight_bytes / g.experts for g in groups if g.experts]
        if self._manifest.experts.memory and sizes:
            slots = min(slots, int(self._manifest.experts.memory / max(sizes)) - self._transient(nodes))
        return [Group(name, node, slots) for name, node in nodes.items()]

    def _share(self, nodes: Mapping[str, str]) -> int:
        """Experts per group, had each one copy."""
        return -(-self._fleet.placement.experts // len(nodes))

    def _transient(self, nodes: Mapping[str, str]) -> int:
        """Experts beyond its slots that a group may hold while a change is made."""
        return max(1, self._share(nodes) // TRANSIENT)

    # --- acting -----------------------------------------------------------------------------------

    async def _carry_out(self, decision: Decision, record: JSON) -> None:
        try:
            ended = await (self._move(decision, record) if decision.kind == COPIES else self._resize(decision, record))
        except (OperationError, PlacementChangeError) as error:
            ended = str(error)
        except Exception as error:
            log.exception("the autoscaler could not act")
            ended = named_line(error)
        finally:
            del self._tasks[decision.kind]
        now = self._clock()
        if ended is None:
            self._autoscaler.succeeded(decision, now)
            self._settle(record, "done")
        else:
            pause = self._autoscaler.failed(decision, now)
            self._settle(record, "failed", f"{ended}; the next one {pause:.0f} s from now at the earliest")

    async def _resize(self, decision: Decision, record: JSON) -> str | None:
        """None, or why it failed."""
        target = (
            Target(expert_groups=decision.count) if decision.kind == GROUPS else Target(attention_shards=decision.count)
        )
        operation = self._reconfigurer.submit(OperationRequest(target, "", False, self.config.patience), AUTOSCALER)
        return await self._ended(operation, record)

    async def _move(self, decision: Decision, record: JSON) -> str | None:
        """In as many steps as the memory wants; given up where the placement is changed by somebody else meanwhile."""
        assert decision.plan is not None
        placement, (nodes, shards) = self._fleet.placement, self._fleet.nodes()
        room = []
        for group in self._room(nodes, self._meters.groups(nodes, shards)):
            slots = max(group.slots or 0, len(placement.held_by(group.name)))
            room.append(replace(group, slots=slots + self._transient(nodes)))
        for steps in stages(placement, room, decision.plan.steps):
            if self._fleet.placement != placement:
                return "the placement was changed by another operation"
            placement = replay(placement, steps)
            failure = await self._ended(self._reconfigurer.rebalance(placement, decision.reason), record)
            if failure is not None:
                return failure
        return None

    async def _ended(self, operation: Operation, record: JSON) -> str | None:
        """Wait for an operation; None, or why it failed."""
        record["operations"].append(operation.id)
        await self._reconfigurer.ended(operation)
        return None if operation.phase is Phase.DONE else "; ".join(operation.reasons[-2:]) or operation.phase.value

    def set_mode(self, mode: AutoscalerMode) -> None:
        """As an operator says; outlives the controller. A change that is under way is finished."""
        log.info("autoscaling is %s, as an operator says", mode)
        self.mode = mode
        self._decided()

    # --- outliving a controller -------------------------------------------------------------------

    def dump(self) -> str:
        """Decisions, counts and pauses as JSON. What the load was is soon known again."""
        counts = [[*key, count] for key, count in self.counts.items()]
        pauses = self._autoscaler.dump(self._clock())
        said = {"mode": self.mode} if self.mode != self.config.mode else {}
        return json.dumps(
            {"time": time.time(), "pauses": pauses, "decisions": list(self.decisions), "counts": counts, **said}
        )

    def _load(self, saved: str) -> None:
        data = json.loads(saved)
        self.mode = data.get("mode", self.mode)
        self._autoscaler.load(data["pauses"], self._clock(), max(0.0, time.time() - data["time"]))
        self.counts = {(kind, result): count for kind, result, count in data["counts"]}
        self.decisions.extend(data["decisions"])
        for record in self.decisions:
            if record["result"] == "under way":
                self._settle(record, "interrupted", "the controller was restarted")

    # --- telling ----------------------------------------------------------------------------------

    def _record(self, decision: Decision) -> JSON:
        record = _described(decision) | {
            "time": time.time(),
            "mode": self.mode,
            "result": "under way",
            "operations": [],
        }
        log.info("autoscaler (%s), %s: %s %s", self.mode, decision.kind, decision.reason, record["figures"])
        self.decisions.append(record)
        self._decided()
        return record

    def _advise(self, decision: Decision) -> None:
        """The advice of last time, with figures of its own, is not written as another one."""
        last = next((r for r in reversed(self.decisions) if r["kind"] == decision.kind), None)
        if last is not None and last.get("count") == _described(decision).get("count"):
            last |= _described(decision) | {"again": last.get("again", 0) + 1, "last_time": time.time()}
        else:
            self._settle(self._record(decision), "advised")

    def _settle(self, record: JSON, result: str, why: str = "") -> None:
        record["result"], record["seconds"] = result, round(time.time() - record["time"], 3)
        if why:
            record["why"] = why
            log.warning("autoscaler, %s: %s", record["kind"], why)
        key = record["kind"], result
        self.counts[key] = self.counts.get(key, 0) + 1
        self._decided()

    def loads(self) -> tuple[list[GroupLoad], list[ShardLoad]]:
        """Of the live workers that have reported lately."""
        group_nodes, shard_nodes = self._fleet.nodes()
        return self._meters.groups(group_nodes, shard_nodes), self._meters.shards(shard_nodes)

    def figures(self) -> dict[str, Figures]:
        """Of the live shards that have reported lately."""
        return self._meters.figures(self._fleet.nodes()[1])

    def group_figures(self) -> dict[str, Figures]:
        """The same of groups."""
        return self._meters.group_figures(self._fleet.nodes()[0])

    def told_loads(self) -> tuple[list[JSON], list[JSON]]:
        """The same as JSON."""
        groups, shards = self.loads()
        return [_rounded(group) for group in groups], [_rounded(shard) for shard in shards]

    def rates(self) -> np.ndarray:
        """Rows per second of each (layer, expert), decayed: float64 [layers, experts]."""
        return self.rows.rates(self._clock())

    def load_view(self) -> list[list[float]] | None:
        """As placement changes want it (`Fleet.expert_load`)."""
        rates = self.rates()
        return rates.tolist() if rates.any() else None

    def report(self) -> JSON:
        """What GET /admin/autoscaler gives; decisions newest last."""
        groups, shards = self.told_loads()
        plan = self._plan
        return {
            "mode": self.mode,
            "interval": self.config.interval,
            "acting": bool(self._tasks),
            "imbalance": None if plan is None else round(plan.imbalance_before, 4),
            "heat": None if plan is None else round(plan.heat_before, 4),
            "plan": None if plan is None else f"{plan.reason}; {plan.loads} loads",
            "groups": groups,
            "shards": shards,
            "decisions": list(self.decisions),
        }

    def summary(self) -> JSON:
        """For `isotherm status`."""
        last = self.decisions[-1] if self.decisions else None
        return {
            "mode": self.mode,
            "acting": bool(self._tasks),
            "decisions": sum(self.counts.values()),
            "last": last,
        }


def _described(decision: Decision) -> JSON:
    figures = {name: round(value, 4) for name, value in decision.figures.items()}
    count = {} if decision.kind == COPIES else {"count": decision.count}
    return {"kind": decision.kind, "reason": decision.reason, "figures": figures, **count}


def _rounded(load: GroupLoad | ShardLoad) -> JSON:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(load).items()}
