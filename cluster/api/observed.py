"""The routes of those who watch: the requests that are open here and those that ended lately. Nothing that was said in
them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from isotherm.cluster.api.replies import json_response
from isotherm.cluster.api.request_book import RequestBook


def observed_routes(book: RequestBook) -> list[Route]:
    """GET /admin/requests."""

    async def requests(request: Request) -> Response:
        running, recent = ([one.as_json() for one in records] for records in (book.running(), book.recent()))
        return json_response({"running": running, "recent": recent})

    return [Route("/admin/requests", requests)]
