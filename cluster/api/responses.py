"""The routes of /v1/responses: a response made, and those that are kept."""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from isotherm.cluster.api.access.caller import caller_of
from isotherm.cluster.api.errors import ReplyError, StreamedError
from isotherm.cluster.api.generation import GenerationRoute, Generator
from isotherm.cluster.api.pages import newest_first, page
from isotherm.cluster.api.prepare_responses import count_input_tokens, not_kept, prepare_responses
from isotherm.cluster.api.replies import json_response
from isotherm.cluster.api.response_store import Kept, ResponseStore
from isotherm.cluster.api.stream import STREAM_HEADERS

_PAGE, _MAX_PAGE = 20, 100  # entries, where its client does not say, and at most


def responses_routes(generator: Generator, store: ResponseStore) -> list[Route]:
    routes = _Responses(generator, store)
    one = "/v1/responses/{response_id}"
    return [
        Route("/v1/responses", routes.create, methods=["POST"]),
        Route("/v1/responses/input_tokens", routes.input_tokens, methods=["POST"]),
        Route(one, routes.one, methods=["GET", "DELETE"]),
        Route(f"{one}/cancel", routes.cancel, methods=["POST"]),
        Route(f"{one}/input_items", routes.input_items, methods=["GET"]),
    ]


class _Responses:
    def __init__(self, generator: Generator, store: ResponseStore) -> None:
        self._generator = generator
        self._store = store

    async def create(self, request: Request) -> Response:
        prepare = partial(prepare_responses, self._store, _owner(request))
        try:
            return await self._generator.reply(request, GenerationRoute("resp_", prepare))
        except StreamedError as error:
            return Response(error.events, headers=STREAM_HEADERS)

    async def input_tokens(self, request: Request) -> Response:
        raw = await self._generator.body(request)
        count = partial(count_input_tokens, self._store, _owner(request), raw, self._generator.served_to(request))
        return json_response({"object": "response.input_tokens", "input_tokens": await asyncio.to_thread(count)})

    async def one(self, request: Request) -> Response:
        kept = await self._kept(request)
        if request.method == "DELETE":
            await asyncio.to_thread(self._store.delete, _owner(request), kept.response_id)
            return json_response({"id": kept.response_id, "object": "response", "deleted": True})
        if request.query_params.get("stream", "false") != "false":
            raise ReplyError("stream: a response that is kept is given whole; leave it out", param="stream")
        return json_response(kept.response)

    async def cancel(self, request: Request) -> Response:
        kept = await self._kept(request)
        raise ReplyError(
            f"response_id: {kept.response_id!r} was not made in the background, so there is nothing to cancel; a "
            "response that is being made ends when its client closes the connection",
            param="response_id",
        )

    async def input_items(self, request: Request) -> Response:
        kept = await self._kept(request)
        items = kept.input_items[::-1] if newest_first(request) else kept.input_items
        return json_response(page(items, request, _PAGE, _MAX_PAGE))

    async def _kept(self, request: Request) -> Kept:
        wanted = request.path_params["response_id"]
        if (kept := await asyncio.to_thread(self._store.get, _owner(request), wanted)) is None:
            raise not_kept(wanted, "response_id", "response_not_found")
        return kept


def _owner(request: Request) -> str:
    """Whose responses a request may see: those that the same key asked for. Where the server has no keys, it is
    whatever a client sends as one, which is not kept itself."""
    if caller := caller_of(request).name:
        return caller
    key = request.headers.get("authorization") or request.headers.get("x-api-key") or ""
    return hashlib.sha256(key.encode()).hexdigest()
