"""A cluster as its event stream (GET /admin/events) tells it: what there is, kept up to date by what changes. Reads
bytes, waits for nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import httpx

from isotherm.cluster.client.answers import checked, raw
from isotherm.cluster.client.errors import ConnectionFailedError, StreamBrokenError
from isotherm.cluster.client.params import FINAL_PHASES, Operation
from isotherm.cluster.errors import one_line
from isotherm.cluster.jsontypes import JSON, JSONValue

PATH = "/admin/events"
_PAUSES = 0.25, 8.0  # seconds before the stream is taken up again: at first, and at most


@dataclass
class ClusterState:
    """`values` by name: `cluster`, `worker/ID`, `node/ID`, `layer/N` (who holds its experts), `heat/N` (their rows per
    second), `heat/groups`, `flows`, `operation/ID`, `autoscaler`, `decision/TIME`, `sample/N` (figures over the last
    minutes). `trouble`: why nothing new comes at present; empty while it does."""

    values: dict[str, JSONValue] = field(default_factory=dict)
    trouble: str = ""

    def all(self, prefix: str) -> list[JSON]:
        """The values whose names begin so."""
        return [value for name, value in self.values.items() if name.startswith(prefix)]

    def operations(self) -> list[Operation]:
        """Oldest first."""
        found = cast("list[Operation]", self.all("operation/"))
        return sorted(found, key=lambda operation: operation["created"])

    def status(self) -> JSON:
        """As `Client.status`, without what only the server's own process knows."""
        under_way = (o for o in self.operations() if o["phase"] not in FINAL_PHASES and not o["dry_run"])
        parts = {"workers": self.all("worker/"), "nodes": self.all("node/"), "operation": next(under_way, None)}
        return {**self.values.get("cluster", {}), **parts}

    def experts(self) -> JSON:
        """As `Client.experts`."""
        layers = sorted(self.all("layer/"), key=lambda layer: layer["layer"])
        none: JSON = {"rate": [], "rows": []}
        heat = [self.values.get(f"heat/{layer['layer']}", none) for layer in layers]
        return {
            "layers": [{**layer, **of} for layer, of in zip(layers, heat, strict=True)],
            "heat": self.values.get("heat/groups", {}),
        }

    def autoscaler(self) -> JSON | None:
        """As `Client.autoscaler`; None where the server has none."""
        if "autoscaler" not in self.values:
            return None
        decisions = sorted(self.all("decision/"), key=lambda decision: decision["time"])
        return {**self.values["autoscaler"], "decisions": decisions}


class FeedReader:
    """Keeps a state by what comes, over as many connections as it takes."""

    def __init__(self, base_url: str) -> None:
        self.state = ClusterState()
        self._base_url = base_url
        self._last = ""  # id of the last part
        self._rest = b""
        self._fields: dict[bytes, bytes] = {}
        self._pause = 0.0

    @property
    def headers(self) -> dict[str, str]:
        """Of the next request."""
        return {"last-event-id": self._last} if self._last else {}

    def begin(self, response: httpx.Response) -> None:
        """A connection is there. Raises APIError where it is refused, and StreamBrokenError where that may pass."""
        self._rest, self._fields = b"", {}
        if response.status_code in (429, 502, 503, 504) and self._last:
            raise StreamBrokenError(f"the server answered {response.status_code}")
        if response.status_code != 200:
            checked(raw(response))

    def feed(self, data: bytes) -> Iterator[ClusterState]:
        """The state after each part that has come. Raises StreamBrokenError where the server says that it cannot tell
        now, or what comes is no part."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line:
                name, _, value = line.partition(b":")
                self._fields[name] = value.strip()
            elif b"data" in self._fields:
                fields, self._fields = self._fields, {}
                self._take(fields)
                yield self.state

    def _take(self, fields: dict[bytes, bytes]) -> None:
        try:
            part = json.loads(fields[b"data"])
            if fields.get(b"event") == b"error":
                raise StreamBrokenError(str(part["error"]["message"]))
            values, gone = dict(part["set"]), list(part["gone"])
        except (ValueError, TypeError, KeyError) as error:
            raise StreamBrokenError(f"a part of the event stream is not in its form: {one_line(error)}") from error
        if fields.get(b"event") == b"snapshot":
            self.state.values.clear()
        for name in gone:
            self.state.values.pop(name, None)
        self.state.values.update(values)
        self.state.trouble, self._pause = "", 0.0
        self._last = fields.get(b"id", b"").decode(errors="replace")

    def broken(self, error: Exception | None) -> float:
        """The connection is gone, because of an error or at the server's own wish: seconds to wait before the next one.
        Raises ConnectionFailedError where there has never been one."""
        if error is not None and not self._last:
            raise ConnectionFailedError(f"{self._base_url}: {one_line(error)}") from error
        self.state.trouble = "the server has ended its event stream" if error is None else one_line(error)
        self._pause = min(max(2 * self._pause, _PAUSES[0]), _PAUSES[1])
        return self._pause
