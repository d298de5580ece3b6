"""An operator's routes' other side that is only written down."""

from __future__ import annotations

from typing import Any


class FakeAdmin:
    def __init__(self) -> None:
        self.fails: Exception | None = None

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
