"""What changes of a cluster need of its workers: the one protocol between who decides and who acts."""

from __future__ import annotations

from typing import Protocol

from isotherm.cluster.control.planner import Desired, Workers
from isotherm.cluster.messages.copies import Pair
from isotherm.cluster.placement.table import Placement


class Fleet(Workers, Protocol):
    """The workers and what can be done about them. Methods raise what Ray raises when a worker is gone. Nothing is
    started on nodes in `avoid`."""

    avoid: frozenset[str]
    waits: dict[str, str]  # worker → the resources that it waits for, in words

    async def reserve(self, worker: str, avoid: frozenset[str]) -> None:
        """Wait for a place for a worker, on none of the nodes in `avoid`; it is started there."""

    def release(self, worker: str) -> None:
        """Give a place back, if there is one where the worker was not started."""

    async def start_group(self, name: str) -> None: ...

    async def start_shard(self, name: str) -> None: ...

    async def link(self, shard: str, group: str) -> None: ...

    async def load(self, group: str, pairs: list[Pair]) -> None: ...

    async def loaded(self) -> dict[str, int]:
        """The bytes that each worker has read of what it loads at this moment; where they are not those of the last
        look, shards wait on for experts that they miss. Takes seconds at most: who does not answer is left out."""

    async def free(self, group: str, pairs: list[Pair]) -> None: ...

    async def held(self, group: str) -> list[Pair]:
        """What the group has loaded."""

    async def adopt(self, shard: str, placement: Placement) -> None: ...

    async def leave_service(self, shard: str, seconds: float) -> None:
        """No new requests to the shard; return when it has none left."""

    async def disconnect(self, shard: str, group: str) -> None: ...

    async def end(self, worker: str) -> None: ...

    def committed(self, desired: Desired) -> None:
        """Every shard routes by the placement of `desired` now; its shards are in service, and no others."""
