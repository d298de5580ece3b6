"""OpenAI's routes for files and batches."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from isotherm.cluster.api.access.caller import caller_of
from isotherm.cluster.api.batches.disk import refused_when_full
from isotherm.cluster.api.batches.service import BatchService
from isotherm.cluster.api.batches.state import FINAL, new_batch, window_seconds
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.batches.upload import receive_file
from isotherm.cluster.api.bodies.common import BodyModel, NonEmpty, at_most
from isotherm.cluster.api.body import read_body
from isotherm.cluster.api.errors import NOT_AGAIN, ReplyError
from isotherm.cluster.api.pages import newest_first, page
from isotherm.cluster.api.parse import parse_body
from isotherm.cluster.api.replies import json_response, to_json
from isotherm.cluster.jsontypes import JSON

_MAX_BODY = 1 << 20  # bytes of a body that asks for a batch
_LIMIT, _MAX_LIMIT = 100, 10_000  # entries of a page, where its client does not say, and at most


class OutputExpiresAfter(BodyModel):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2592000)


_MetadataText = Annotated[str, StringConstraints(max_length=512)]
_MetadataKey = Annotated[str, StringConstraints(max_length=64)]


class BatchBody(BodyModel):
    """POST /v1/batches."""

    input_file_id: NonEmpty
    endpoint: NonEmpty
    completion_window: NonEmpty
    metadata: Annotated[dict[_MetadataKey, _MetadataText] | None, at_most(16)] = Field(None, max_length=16)
    output_expires_after: OutputExpiresAfter | None = None

    @field_validator("completion_window")
    @classmethod
    def _window(cls, value: str) -> str:
        try:
            window_seconds(value)
        except ValueError:
            raise PydanticCustomError(
                "window", "Expected hours or minutes of at most a week, such as 24h or 30m"
            ) from None
        return value


def batch_routes(service: BatchService, endpoints: Collection[str]) -> list[Route]:
    """/v1/files and /v1/batches. `endpoints`: the routes that rows may ask."""
    files, batches = _Files(service.store, service.limits.max_file_bytes), _Batches(service, endpoints)
    return [
        Route("/v1/files", files.all, methods=["GET", "POST"]),
        Route("/v1/files/{file_id}", files.one, methods=["GET", "DELETE"]),
        Route("/v1/files/{file_id}/content", files.content),
        Route("/v1/batches", batches.all, methods=["GET", "POST"]),
        Route("/v1/batches/{batch_id}", batches.one),
        Route("/v1/batches/{batch_id}/cancel", batches.cancel, methods=["POST"]),
    ]


class _Files:
    def __init__(self, store: Store, max_file_bytes: int) -> None:
        self._store, self._max_file_bytes = store, max_file_bytes

    async def all(self, request: Request) -> Response:
        if request.method == "POST":
            return json_response(await receive_file(request, self._store, self._max_file_bytes))
        purpose, newest = request.query_params.get("purpose"), newest_first(request)
        there = await asyncio.to_thread(self._store.files, caller_of(request).name)
        found = [one for one in there if purpose in (None, one["purpose"])]
        return json_response(page(found if newest else found[::-1], request, _LIMIT, _MAX_LIMIT))

    async def one(self, request: Request) -> Response:
        file_id, owner = request.path_params["file_id"], caller_of(request).name
        if request.method == "DELETE":
            await asyncio.to_thread(self._store.delete_file, file_id, owner)
            return json_response({"id": file_id, "object": "file", "deleted": True})
        return json_response(self._store.file(file_id, owner))

    async def content(self, request: Request) -> Response:
        path = self._store.content(request.path_params["file_id"], caller_of(request).name)
        return FileResponse(path, media_type="application/octet-stream")


class _Batches:
    def __init__(self, service: BatchService, endpoints: Collection[str]) -> None:
        self._service, self._store, self._endpoints = service, service.store, endpoints

    async def all(self, request: Request) -> Response:
        owner = caller_of(request).name
        if request.method != "POST":
            return json_response(page(await asyncio.to_thread(self._store.batches, owner), request, _LIMIT, _MAX_LIMIT))
        body = parse_body(BatchBody, await read_body(request, _MAX_BODY))
        created = await asyncio.to_thread(self._create, body, owner)
        self._service.added()
        return json_response(created)

    def _create(self, body: BatchBody, owner: str) -> JSON:
        if body.endpoint not in self._endpoints:
            expected = " or ".join(sorted(self._endpoints))
            raise ReplyError(f"endpoint: expected {expected}, got {body.endpoint[:100]!r}", param="endpoint")
        source = self._store.file(body.input_file_id, owner, "input_file_id")
        if source["purpose"] != "batch":
            message = f"input_file_id: expected a file uploaded with purpose 'batch', got {source['purpose']!r}"
            raise ReplyError(message, param="input_file_id")
        keep = body.output_expires_after.seconds if body.output_expires_after is not None else None
        batch_id, window, now = f"batch_{uuid.uuid4().hex}", body.completion_window, self._store.clock()
        batch = new_batch(batch_id, body.endpoint, source["id"], window, body.metadata, keep, now, owner)
        with refused_when_full("the batch"), self._store.space.hold(owner) as hold:
            hold.grow(len(to_json(batch)), what="batch", param=None)
            self._store.add_batch(batch)
        return self._store.batch(batch_id)

    async def one(self, request: Request) -> Response:
        return json_response(self._store.batch(request.path_params["batch_id"], caller_of(request).name))

    async def cancel(self, request: Request) -> Response:
        found = self._store.batch(request.path_params["batch_id"], caller_of(request).name)
        if found["status"] in FINAL:
            message = f"batch_id: the batch is {found['status']} already"
            raise ReplyError(message, status=409, param="batch_id", headers=NOT_AGAIN)
        with refused_when_full("the batch's cancellation"):
            self._store.cancel(found["id"])
        self._service.added()
        return json_response(self._store.batch(found["id"]))


def refused_routes(reason: str) -> list[Route]:
    """The same paths, where this server takes no files and batches, and there is a reason to give."""

    async def refuse(request: Request) -> Response:
        message = f"files and batches are not taken here: {reason}"
        raise ReplyError(message, status=501, code="not_available", headers=NOT_AGAIN)

    paths = ("/v1/files", "/v1/files/{rest:path}", "/v1/batches", "/v1/batches/{rest:path}")
    return [Route(path, refuse, methods=["GET", "POST", "DELETE"]) for path in paths] if reason else []
