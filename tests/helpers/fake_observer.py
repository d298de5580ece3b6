"""An observer of a front door that nothing else belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isotherm.cluster.api.request_book import RequestBook, Sink


class FakeObserver:
    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.book = RequestBook(sinks)

    async def metrics(self) -> str:
        return "isotherm_placement_version 3.0\n"

    async def requests(self) -> dict[str, Any]:
        return {
            "running": [one.as_json() for one in self.book.running()],
            "recent": [one.as_json() for one in self.book.recent()],
        }
