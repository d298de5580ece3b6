"""The routes of those who watch: metrics, and the requests that are open or ended lately. Nothing that was said in
them."""

from __future__ import annotations

from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from isotherm.cluster.api.replies import json_response
from isotherm.cluster.api.request_book import RequestBook
from isotherm.cluster.jsontypes import JSON


class Observer(Protocol):
    """What is observed of this server: its own requests, and by whatever way those of others beside it."""

    @property
    def book(self) -> RequestBook:
        """What this process is told of its requests."""

    async def metrics(self) -> str:
        """Prometheus' text format."""

    async def requests(self) -> JSON: ...


def observed_routes(observer: Observer) -> list[Route]:
    """GET /admin/requests and GET /metrics."""

    async def requests(request: Request) -> Response:
        return json_response(await observer.requests())

    async def metrics(request: Request) -> Response:
        return Response(await observer.metrics(), media_type="text/plain; version=0.0.4")

    return [Route("/admin/requests", requests), Route("/metrics", metrics)]
