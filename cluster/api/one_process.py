"""What GET /admin/events tells of a server that is one process: what its engine says of itself."""

from __future__ import annotations

import asyncio
import time
import uuid

from isotherm.cluster.api.engine_client import EngineClient
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.feed import FeedPart, FeedTable

PERIOD = 1.0  # seconds between two looks
HISTORY = 300  # looks that are kept


class OneProcess:
    """FeedSource of cluster/api/events.py; the engine is looked at while somebody listens."""

    def __init__(self, engine: EngineClient, model: str) -> None:
        self._engine = engine
        self._table = FeedTable(uuid.uuid4().hex[:12])
        self._head = {"model": {"id": model, "max_model_len": engine.max_model_len}, "one_process": True}
        self._looked = float("-inf")
        self._before: tuple[float, int] | None = None  # when, and tokens by then
        self._samples: list[int] = []
        self._lock = asyncio.Lock()

    async def feed_part(self, last: str) -> FeedPart | None:
        """As FeedSource says."""
        for _ in range(2):
            await self._look()
            if (part := self._table.since(last)) is not None:
                return part
            await asyncio.sleep(PERIOD)
        return None

    async def _look(self) -> None:
        async with self._lock:  # one look for all who listen
            now = time.monotonic()
            if now - self._looked < PERIOD:
                return
            self._looked = now
            status = await self._engine.status()
            phase = self._engine.not_ready() or "serving"
            version = status.get("placement_version")
            self._table.put("cluster", self._head | {"controller": {"phase": phase}, "placement_version": version})
            self._table.replace("worker/", {worker["id"]: worker for worker in status["workers"]})
            self._sample(status["workers"], now)

    def _sample(self, workers: list[JSON], now: float) -> None:
        tokens = sum(worker.get("tokens", 0) for worker in workers)
        before, self._before = self._before, (now, tokens)
        if before is None:
            return
        blocks = sum(worker.get("kv_blocks", 0) for worker in workers)
        number = self._samples[-1] + 1 if self._samples else 1
        sample = {
            "n": number,
            "time": round(time.time(), 2),
            "tokens_per_second": round(max(0, tokens - before[1]) / (now - before[0]), 1),
            "running": sum(worker.get("running", 0) for worker in workers),
            "waiting": sum(worker.get("waiting", 0) for worker in workers),
            "kv_used": round(sum(worker.get("kv_blocks_used", 0) for worker in workers) / max(1, blocks), 4),
        }
        self._table.put(f"sample/{number}", sample)
        self._samples.append(number)
        if len(self._samples) > HISTORY:
            self._table.drop(f"sample/{self._samples.pop(0)}")
