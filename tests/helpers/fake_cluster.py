"""An operator's routes' other side that behaves like a cluster: load that wanders over the experts, operations that go
through their phases, workers that come and go. For the page, whose tests need no Ray for what they look at."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import numpy as np

from isotherm.cluster.messages.feed import FeedPart, FeedTable
from isotherm.cluster.messages.operations import Operation, OperationError, Phase, parse_mode, parse_operation
from isotherm.cluster.observe.rows import (
    autoscaler_rows,
    heat_rows,
    operation_rows,
    placement_rows,
    sample_rows,
    status_rows,
)
from isotherm.cluster.placement.table import Placement, contiguous_placement

PHASE_SECONDS = 0.4


class FakeCluster:
    """AdminClient without workers. `hostile` is in every place where a text is shown."""

    def __init__(self, layers: int = 4, experts: int = 16, model: str = "tiny", hostile: str = "") -> None:
        self.model, self.hostile = model, hostile
        self.shards, self.groups = ["attention-0", "attention-1"], ["expert-0", "expert-1", "expert-2"]
        self.names = len(self.groups)
        self.placement = contiguous_placement(range(1, layers + 1), experts, self.groups)
        self.mode = "on"
        self.dead: dict[str, str] = {}
        self.drained: set[str] = set()
        self.pinned: set[tuple[int, int]] = set()
        self.operations: list[Operation] = []
        self.decisions: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.turn = 0
        self._table = FeedTable("fake")
        self._looked = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        now = time.time()
        for i in range(120):
            self._sample(now - 240 + 2 * i)
        for i, result in enumerate(["done", "done", "advised"]):
            self.decisions.append(
                {"time": now - 200 + 60 * i, "kind": "copies", "result": result, "mode": "on", "operations": [],
                 "reason": f"the hottest group has 1.{4 - i}1 times the mean's load {hostile}",
                 "figures": {"heat": 1.41 - i / 10, "loads": 3.0}}
            )  # fmt: skip

    # --- what is told ---

    def _sample(self, at: float) -> None:
        self.turn += 1
        wave = 0.5 + 0.35 * math.sin(self.turn / 9) + 0.15 * math.sin(self.turn / 3.1)
        self.samples = [*self.samples[-149:], {
            "n": self.turn, "time": round(at, 2), "tokens_per_second": round(820 * wave, 1),
            "steps_per_second": round(90 * wave, 1), "rows_per_second": round(13000 * wave, 1),
            "running": int(24 * wave), "waiting": int(max(0, 9 * (wave - 0.6))), "kv_used": round(0.2 + 0.5 * wave, 4),
            "first_token_seconds": round(0.04 + 0.1 * wave, 4), "busy": round(0.8 * wave, 4),
        }]  # fmt: skip

    def rates(self) -> np.ndarray:
        layers, experts = len(self.placement.layers), len(self.placement.holders[0])
        at_LE = np.add.outer(np.arange(layers) * 2.3, np.arange(experts) * 0.55)
        drift_LE = np.add.outer(np.arange(layers), -np.arange(experts)) * 0.9
        swell_LE = np.exp(1.1 * np.sin(at_LE + self.turn / 12) + 0.8 * np.cos(drift_LE))
        return 40.0 * swell_LE

    def status(self) -> dict[str, Any]:
        workers = []
        for i, name in enumerate([*self.shards, *self.groups]):
            role = "attention" if name in self.shards else "expert"
            worker = {
                "id": name,
                "role": role,
                "pid": 100 + i,
                "node": f"{i % 2:x}" * 40,
                "host": f"10.0.0.{1 + i % 2}",
            }
            if name in self.dead:
                workers.append(worker | {"state": "dead", "reason": self.dead[name]})
            elif role == "attention":
                counts = {"running": 7, "waiting": 1, "tokens": 100 * self.turn, "steps": self.turn}
                kv = {"kv_blocks_used": 120 + self.turn % 40, "kv_blocks": 256}
                drafts = {"kind": "mtp", "drafted": 10 * self.turn, "tried": [5 * self.turn] * 2, "steps": self.turn,
                          "accepted": [4 * self.turn, 3 * self.turn], "gain": 1.31,
                          "why": f"80% of first drafts are right {self.hostile}"}  # fmt: skip
                workers.append(worker | {"state": "loaded", "speculation": drafts} | counts | kv)
            else:
                held = {"experts": len(self.placement.held_by(name)), "weight_bytes": 90 << 20}
                counts = {"pairs": 900 * self.turn, "busy_seconds": 0.6 * self.turn}
                workers.append(worker | {"state": "loaded"} | held | counts)
        ids = [f"{i:x}" * 40 for i in range(2)]
        nodes = [
            {"id": id, "address": f"10.0.0.{1 + i}", "alive": True, "drained": id in self.drained}
            for i, id in enumerate(ids)
        ]
        return {"controller": {"phase": "serving", "restarts": 1}, "model": {"id": self.model, "max_model_len": 4096},
                "url": "", "placement_version": self.placement.version, "workers": workers, "nodes": nodes}  # fmt: skip

    async def feed_part(self, last: str) -> FeedPart | None:
        for _ in range(4):
            if time.monotonic() - self._looked > 0.9:
                self._looked = time.monotonic()
                self._sample(time.time())
                self._put()
            if (part := self._table.since(last)) is not None:
                return part
            await asyncio.sleep(0.3)
        return None

    def _put(self) -> None:
        rates = self.rates()
        flows = {
            shard: {
                group: round(1200 * (1 + i + j) * abs(math.sin(self.turn / 8 + i + 2 * j)), 1)
                for j, group in enumerate(self.groups)
            }
            for i, shard in enumerate(self.shards)
        }
        loads = [{"name": s, "tokens_per_second": 400.0 + self.turn % 30} for s in self.shards]
        loads += [{"name": g, "busy": 0.5, "rows_per_second": 4100.0 + self.turn % 70} for g in self.groups]
        rows = {
            **status_rows(self.status(), loads),
            **placement_rows(self.placement, self.pinned),
            **heat_rows(self.placement, self.groups, rates, (rates * self.turn).astype(np.int64), flows),
            **operation_rows([o.as_dict() | {"waiting": []} for o in self.operations]),
            **autoscaler_rows(self._report()),
            **sample_rows(self.samples),
        }
        for prefix, values in rows.items():
            if "" in values:
                self._table.put(prefix, values[""])
            else:
                self._table.replace(prefix, values)

    def _report(self) -> dict[str, Any]:
        return {"mode": self.mode, "interval": 2.0, "acting": False, "imbalance": 1.21, "heat": 1.34,
                "plan": f"nothing is worth a load {self.hostile}", "groups": [], "shards": [], "decisions": self.decisions}  # fmt: skip # noqa: E501

    # --- AdminClient ---

    async def operate(self, body: Any) -> dict[str, Any]:
        request = parse_operation(body)
        if self.hostile:
            raise OperationError(f"expert_groups: {self.hostile}", "expert_groups")
        target = {k: v for k, v in request.target.model_dump(exclude_defaults=True).items() if v is not None}
        operation = Operation(f"op-{len(self.operations) + 1}", target, "api", time.time(), dry_run=request.dry_run)
        operation.entered["planned"] = time.time()
        if target.get("expert_groups"):
            operation.plan = [
                f"start expert-{self.names}",
                f"load 12 experts into expert-{self.names}",
                "commit placement",
            ]
        else:
            operation.plan = ["load 1 expert into expert-2", "commit placement"]
        self.operations.append(operation)
        if request.dry_run:
            operation.enter(Phase.DONE, time.time())
        else:
            task = asyncio.ensure_future(self._carry_out(operation, request.target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return operation.as_dict()

    async def _carry_out(self, operation: Operation, target: Any) -> None:
        for phase in (Phase.PREPARING, Phase.COMMITTING):
            await asyncio.sleep(PHASE_SECONDS)
            operation.enter(phase, time.time())
            self._looked = 0.0
        await asyncio.sleep(PHASE_SECONDS)
        while target.expert_groups and len(self.groups) < target.expert_groups:
            self.groups.append(f"expert-{self.names}")
            self.names += 1
        if target.expert_groups:
            self.groups = self.groups[: target.expert_groups]
            layers, experts = self.placement.layers, len(self.placement.holders[0])
            self.placement = contiguous_placement(layers, experts, self.groups, self.placement.version + 1)
        for copy in target.copies:
            self._copy(copy.layer, copy.expert, copy.count)
        if target.drain_nodes is not None:
            self.drained = set(target.drain_nodes)
        operation.enter(Phase.DONE, time.time())
        self._looked = 0.0

    def _copy(self, layer: int, expert: int, count: int | None) -> None:
        table = [[list(held) for held in experts] for experts in self.placement.holders]
        row = self.placement.layers.index(layer)
        others = [g for g in self.groups if g not in table[row][expert]]
        table[row][expert] = (table[row][expert] + others)[: count or 1]
        (self.pinned.add if count else self.pinned.discard)((layer, expert))
        holders = tuple(tuple(tuple(held) for held in experts) for experts in table)
        self.placement = Placement(self.placement.version + 1, self.placement.layers, holders)

    async def operation(self, operation_id: str) -> dict[str, Any] | None:
        return next((o.as_dict() for o in self.operations if o.id == operation_id), None)

    async def operation_history(self) -> list[dict[str, Any]]:
        return [o.as_dict() for o in self.operations]

    async def experts(self) -> dict[str, Any]:
        return {}

    async def autoscaler(self) -> dict[str, Any]:
        return self._report()

    async def set_autoscaler(self, body: Any) -> dict[str, Any]:
        self.mode = parse_mode(body)
        self._looked = 0.0
        return self._report()

    async def metrics(self) -> str:
        return ""
