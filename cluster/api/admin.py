"""The operator's routes: scale operations and experts. Knows nothing about Ray."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from isotherm.cluster.api.body import read_body
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.replies import to_json
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.feed import FeedPart
from isotherm.cluster.messages.operations import OperationError, PlacementChangeError

MAX_BODY = 8 << 20  # bytes


class AdminClient(Protocol):
    """What the routes need of a cluster."""

    async def operate(self, body: Any) -> JSON:
        """Take an operation. Raises OperationError or PlacementChangeError."""

    async def operation(self, operation_id: str) -> JSON | None: ...

    async def operation_history(self) -> list[JSON]: ...

    async def experts(self) -> JSON: ...

    async def autoscaler(self) -> JSON: ...

    async def set_autoscaler(self, body: Any) -> JSON:
        """Change the autoscaler's mode. Raises OperationError."""

    async def feed_part(self, last: str) -> FeedPart | None:
        """As FeedSource of cluster/api/events.py says."""


def admin_routes(admin: AdminClient) -> list[Route]:
    """POST and GET /admin/operations, GET /admin/operations/{id}, GET /admin/experts, GET and POST
    /admin/autoscaler. HEAD comes wherever GET does, and needs no more of a key: only POST changes anything."""

    async def operations(request: Request) -> Response:
        if request.method == "POST":
            return _json(await _changed(admin.operate, request), 202)
        return _json({"operations": await admin.operation_history()})

    async def operation(request: Request) -> Response:
        found = await admin.operation(request.path_params["id"])
        if found is None:
            raise ReplyError(f"there is no operation {request.path_params['id'][:100]!r}", status=404, param="id")
        return _json(found)

    async def experts(request: Request) -> Response:
        return _json(await admin.experts())

    async def autoscaler(request: Request) -> Response:
        if request.method == "POST":
            return _json(await _changed(admin.set_autoscaler, request))
        return _json(await admin.autoscaler())

    return [
        Route("/admin/operations", operations, methods=["GET", "POST"]),
        Route("/admin/operations/{id}", operation),
        Route("/admin/experts", experts),
        Route("/admin/autoscaler", autoscaler, methods=["GET", "POST"]),
    ]


async def _changed(change: Callable[[Any], Awaitable[JSON]], request: Request) -> JSON:
    """What a change says that a body asks for."""
    body = await read_body(request, MAX_BODY, json_only=False)
    try:
        decoded = json.loads(body)
    except (ValueError, RecursionError):
        raise ReplyError("body: not valid JSON", param="body") from None
    try:
        return await change(decoded)
    except OperationError as error:
        raise ReplyError(str(error), status=409 if error.conflict else 400, param=error.field or None) from None
    except PlacementChangeError as error:
        raise ReplyError(str(error), param="copies") from None


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")
