"""Asks a served cluster, several times a second, for a new completion and whether it is ready; judges what it was
told."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field

import httpx

PERIOD = 0.25  # seconds from one probe to the next of the same kind
SILENCE = 40.0  # seconds after which a probe counts as never answered


@dataclass
class Probe:
    """`status`: of HTTP; 0 where there was none, as `words` say."""

    begin: float
    end: float = float("inf")
    status: int = 0
    words: str = ""


@dataclass
class Probes:
    """Context manager: probes inside the block, in a thread of its own; what has not been answered then is waited
    for."""

    url: str
    requests: list[Probe] = field(default_factory=list)
    readiness: list[Probe] = field(default_factory=list)

    def __enter__(self) -> Probes:
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        async with httpx.AsyncClient(base_url=self.url, timeout=SILENCE, limits=limits) as client:
            begun = []
            while not self._over.is_set():
                begun.append(asyncio.create_task(_ask(self.requests, client, "POST", "/v1/completions", body)))
                begun.append(asyncio.create_task(_ask(self.readiness, client, "GET", "/ready", None)))
                await asyncio.sleep(PERIOD)
            await asyncio.gather(*begun)

    # --- what was seen ----------------------------------------------------------------------------

    def waited(self, hindered_until: float = 0.0) -> float:
        """The longest that a new request went without an answer, in seconds; `hindered_until` (of time.monotonic)
        nobody could answer."""
        return max(probe.end - max(probe.begin, hindered_until) for probe in self.requests)

    def hung_though_ready(self) -> float:
        """The longest that a request had waited already when GET /ready said 200, and went on to wait."""
        return self._hung()[0]

    def hung_longest(self, start: float) -> str:
        """Which request and which answer of GET /ready that was, in seconds from a start."""
        _, request, ready = self._hung()
        if request is None or ready is None:
            return "none"
        times = (moment - start for moment in (request.begin, request.end, ready.begin, ready.end))
        return "asked at {:.2f} and answered at {:.2f} s; /ready at {:.2f} and {:.2f} s".format(*times)

    def _hung(self) -> tuple[float, Probe | None, Probe | None]:
        pairs = [(request, ready) for request in self.requests for ready in self.readiness if ready.status == 200]
        found = max(pairs, key=lambda pair: _hung_seconds(*pair), default=None)
        return (0.0, None, None) if found is None else (_hung_seconds(*found), *found)

    def refused(self) -> list[Probe]:
        return [probe for probe in self.requests if probe.status != 200]

    def served_again(self, fault: float) -> float:
        """Seconds from a fault to the beginning of the first request from which on every one was served."""
        return max((probe.begin + PERIOD - fault for probe in self.refused()), default=0.0)

    def not_ready_seconds(self) -> float:
        return PERIOD * sum(probe.status != 200 for probe in self.readiness)


def _hung_seconds(request: Probe, ready: Probe) -> float:
    return min(ready.end - request.begin, request.end - ready.end)


async def _ask(into: list[Probe], client: httpx.AsyncClient, method: str, path: str, body: dict | None) -> None:
    probe = Probe(time.monotonic())
    into.append(probe)
    try:
        response = await client.request(method, path, json=body)
        probe.status, probe.words = response.status_code, response.text[:200]
    except httpx.TransportError as error:
        probe.words = repr(error)
    probe.end = time.monotonic()
