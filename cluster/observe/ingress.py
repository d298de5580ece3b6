"""What one ingress replica observes and hands on: its request book, its figures, and through whom one scrape of it
gives the whole cluster."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from isotherm.cluster.api.request_book import REMEMBERED, RequestBook, Sink
from isotherm.cluster.errors import one_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.messages.figures import Family, Figures, Metric
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.observe.metrics import render_alone
from isotherm.cluster.observe.request_figures import RequestFigures
from isotherm.cluster.observe.request_log import log_request

log = logging.getLogger(__name__)
REPORT_SECONDS = 2.0  # between two reports to the others
PATIENCE = 2.0  # with which others are asked, while somebody waits
REPORTED = 50  # requests that have ended, of which the others hear
OPEN = Metric("isotherm_requests_open", "Requests that are open at an ingress replica", "gauge")


class Others(Protocol):
    """The rest of the cluster, which every replica reports to and any of them asks. Raises WorkerGoneError while nobody
    is there."""

    async def report(self, ingress: str, figures: Figures, requests: JSON) -> None: ...

    async def metrics(self, ingress: str, figures: Figures) -> str:
        """Prometheus' text for the whole cluster, the reported figures of this replica being the newest."""

    async def requests(self) -> dict[str, JSON]:
        """What each replica has reported last of its requests."""


class IngressObserver:
    """`name` is this replica's among all; `sinks` are told of every request that ends, besides the figures."""

    def __init__(self, name: str, others: Others, sinks: Sequence[Sink] = ()) -> None:
        self.name, self._others = name, others
        self._figures = RequestFigures()
        self.book = RequestBook([self._figures.take, *sinks])
        self._reported: tuple[list[Family], list[JSON]] = [], []
        self.waiting_batches: Callable[[], list[JSON]] = list  # as BatchService.waiting gives them

    @classmethod
    def of(cls, manifest: Manifest, name: str, others: Others, logs: bool = True) -> IngressObserver:
        """With a log line for each request, unless the process's log is somebody else's, and traces where the manifest
        wants them. Raises TracingError."""
        observer = cls(name, others, [log_request] if logs else [])
        if (endpoint := manifest.tracing.endpoint) is not None:
            from isotherm.cluster.observe.tracing import Traces, otlp

            observer.book.tell(Traces(name, manifest.model_id, otlp(endpoint)).request)
            observer.book.trace(manifest.tracing.sample)
        return observer

    def figures(self) -> list[Family]:
        return [*self._figures.read(), Family(OPEN, {(): self.book.open_count})]

    async def metrics(self) -> str:
        """What GET /metrics gives."""
        figures = self.figures()
        try:
            # A controller that is being replaced is not gone: Ray keeps the question for the next one.
            return await asyncio.wait_for(self._others.metrics(self.name, figures), PATIENCE)
        except (WorkerGoneError, asyncio.TimeoutError) as error:
            log.warning("metrics are this replica's alone: %s", one_line(error))
            return render_alone({self.name: figures})

    async def requests(self) -> JSON:
        """What GET /admin/requests gives: of this replica as it is now, of others as they have reported."""
        found: dict[str, JSON] = {}
        with contextlib.suppress(WorkerGoneError, asyncio.TimeoutError):
            found = await asyncio.wait_for(self._others.requests(), PATIENCE)
        own = self._own_requests(REMEMBERED)
        replicas = [own, *(reported for name, reported in sorted(found.items()) if name != self.name)]
        running = [one for replica in replicas for one in replica["running"]]
        recent = [one for replica in replicas for one in replica["recent"]]
        recent.sort(key=lambda one: -(one["started"] + one["seconds"]))
        return {"running": sorted(running, key=lambda one: one["started"]), "recent": recent}

    def _own_requests(self, most: int) -> JSON:
        return {
            "running": [record.as_json() | {"ingress": self.name} for record in self.book.running()],
            "recent": [record.as_json() | {"ingress": self.name} for record in self.book.recent(most)],
        }

    async def keep_reporting(self) -> None:
        """Report again and again what is new, and now and then that there is nothing new."""
        reported_at = float("-inf")
        while True:
            figures, waiting = news = self.figures(), self.waiting_batches()
            now = time.monotonic()
            if news != self._reported or self.book.open_count or now > reported_at + 5 * REPORT_SECONDS:
                try:
                    batches: JSON = {"waiting_batches": waiting} if waiting else {}
                    await self._others.report(self.name, figures, self._own_requests(REPORTED) | batches)
                    self._reported, reported_at = news, now
                except WorkerGoneError as error:
                    log.debug("nothing was reported: %s", one_line(error))
            await asyncio.sleep(REPORT_SECONDS)
