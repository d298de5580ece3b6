"""An operator's routes' other side that is only written down."""

from __future__ import annotations

import asyncio
from typing import Any

from isotherm.cluster.messages.feed import FeedPart, FeedTable


class FakeAdmin:
    def __init__(self) -> None:
        self.fails: Exception | None = None
        self.feed = FeedTable("epoch")

    async def operate(self, body: Any) -> dict[str, Any]:
        if self.fails is not None:
            raise self.fails
        return {"id": "op-1", "phase": "planned", "target": body}

    async def operation(self, operation_id: str) -> dict[str, Any] | None:
        return {"id": operation_id} if operation_id == "op-1" else None

    async def operation_history(self) -> list[dict[str, Any]]:
        return [{"id": "op-1"}]

    async def experts(self) -> dict[str, Any]:
        return {"heat": {"expert-0": 1.0}}

    async def autoscaler(self) -> dict[str, Any]:
        return {"mode": "on", "decisions": []}

    async def set_autoscaler(self, body: Any) -> dict[str, Any]:
        if self.fails is not None:
            raise self.fails
        return {"mode": body["mode"], "decisions": []}

    async def feed_part(self, last: str) -> FeedPart | None:
        if self.fails is not None:
            raise self.fails
        if last != "":
            await asyncio.sleep(0.02)
        return self.feed.since(last)
