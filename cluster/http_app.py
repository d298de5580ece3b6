"""The OpenAI-compatible HTTP application: routes, request bodies, streams, disconnects. Knows nothing about Ray or about how tokens are made."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from isotherm.cluster.engine_client import EngineClient, EngineUnavailableError
from isotherm.cluster.http_admin import AdminClient, admin_routes
from isotherm.cluster.http_middleware import RequestIdMiddleware
from isotherm.cluster.openai_prepare import Limits, Prepared, prepare_chat, prepare_completion
from isotherm.cluster.openai_schemas import APIError
from isotherm.cluster.openai_stream import SSE_DONE, Choice, GenerationError, Reply, Update, merged, sse, to_json, usage
from isotherm.cluster.requests import Delta, GenerationRequest
from isotherm.cluster.text import Tokenizer

logger = logging.getLogger(__name__)
_INLINE_BYTES = 16 * 1024  # a completions body up to this size is tokenised in well under a millisecond: no thread
_T = TypeVar("_T")


@dataclass(frozen=True)
class AppSettings:
    """Limits of the front door."""

    max_body_bytes: int = 8 << 20
    max_prompt_chars_per_token: int = 16  # × max_model_len: more characters than that are refused before tokenising
    retry_after_s: int = 1  # with a 503


def build_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    model_id: str,
    aliases: Sequence[str] = (),
    settings: AppSettings | None = None,
    admin: AdminClient | None = None,
) -> Starlette:
    """The ASGI application that serves one model under `model_id` and its aliases; with `admin`, the operator's routes too."""
    door = FrontDoor(engine, tokenizer, model_id, aliases, settings or AppSettings())
    return Starlette(
        routes=[
            Route("/v1/models", door.models),
            Route("/v1/models/{model:path}", door.model),
            Route("/v1/chat/completions", door.chat_completions, methods=["POST"]),
            Route("/v1/completions", door.completions, methods=["POST"]),
            Route("/health", door.health),
            Route("/ready", door.ready),
            Route("/status", door.status),
            Route("/version", door.version),
            *(admin_routes(admin) if admin is not None else []),
        ],
        # Outermost first. API keys go right after the request id.
        middleware=[Middleware(RequestIdMiddleware)],
        exception_handlers={APIError: _on_api_error, HTTPException: _on_http_exception, ClientDisconnect: _on_disconnect, Exception: _on_exception},
    )


class FrontDoor:
    """The endpoints. Holds what every request needs; nothing here changes after construction."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, model_id: str, aliases: Sequence[str], settings: AppSettings) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._models = tuple(dict.fromkeys([model_id, *aliases]))
        self._settings = settings
        self._created = int(time.time())
        self._version = importlib.metadata.version("isotherm")

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model(name) for name in self._models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._models:
            raise APIError(f"model: {name[:100]!r} is not served here", status=404, param="model", code="model_not_found")
        return _json(self._model(name))

    async def health(self, request: Request) -> Response:
        return _json({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        reason = self._engine.not_ready()
        return _json({"status": "ready"}) if reason is None else _json({"status": "not ready", "reason": reason}, 503, self._retry_after)

    async def status(self, request: Request) -> Response:
        return _json(await self._engine.status())

    async def version(self, request: Request) -> Response:
        return _json({"version": self._version})

    async def chat_completions(self, request: Request) -> Response:
        return await self._reply(request, prepare_chat, "chatcmpl")

    async def completions(self, request: Request) -> Response:
        return await self._reply(request, prepare_completion, "cmpl")

    @property
    def _retry_after(self) -> dict[str, str]:
        return {"retry-after": str(self._settings.retry_after_s)}

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "isotherm",
            "root": self._models[0],
            "max_model_len": self._engine.max_model_len,
            "vocab_size": self._engine.vocab_size,
        }

    async def _reply(self, request: Request, prepare: Callable[..., Prepared], prefix: str) -> Response:
        raw = await _read_body(request, self._settings.max_body_bytes)
        reply_id = f"{prefix}-{uuid.uuid4().hex}"
        max_model_len = self._engine.max_model_len
        limits = Limits(max_model_len, self._engine.vocab_size, max_model_len * self._settings.max_prompt_chars_per_token)
        prepare = partial(prepare, raw, reply_id, self._models, self._tokenizer, limits)
        inline = prefix == "cmpl" and len(raw) <= _INLINE_BYTES
        prepared = prepare() if inline else await asyncio.to_thread(prepare)
        chat = prefix == "chatcmpl"
        body = prepared.body
        choices = [
            Choice(
                i,
                generation,
                self._tokenizer,
                stop=body.stops,
                skip_special_tokens=body.skip_special_tokens is not False,
                chat=chat,
                echo=prepared.echo[i],
            )
            for i, generation in enumerate(prepared.requests)
        ]
        reply = Reply(
            reply_id, body.model, int(time.time()), self._engine.system_fingerprint or None, chat=chat,
            include_usage=bool(body.stream and body.include_usage),
        )
        try:
            if not body.stream:
                return _json(await _until_disconnect(request.receive, self._collect(prepared, choices, reply)))
            # The status line waits for the first event, so that a refusal is still an HTTP status.
            events = self._events(prepared, choices, reply)
            first = await _until_disconnect(request.receive, _next(events))
            return EventStream(first, events)
        except EngineUnavailableError as error:
            message = str(error) or "the model can't be served right now"
            raise APIError(message, status=503, kind="server_error", code="unavailable", headers=self._retry_after) from error
        except GenerationError as error:
            raise APIError(str(error), status=500, kind="server_error", code="generation_failed") from error

    async def _collect(self, prepared: Prepared, choices: Sequence[Choice], reply: Reply) -> dict[str, Any]:
        updates: list[list[Update]] = [[] for _ in choices]
        async with aclosing(self._updates(prepared, choices)) as stream:
            async for update in stream:
                updates[update.index].append(update)
        return reply.whole([merged(part) for part in updates], usage(prepared.prompt_tokens, choices, prepared.body.n or 1))

    async def _events(self, prepared: Prepared, choices: Sequence[Choice], reply: Reply) -> AsyncGenerator[bytes, None]:
        """The server-sent events, one bytes object per update. Before the first event errors are raised, after it they are an event, and the stream
        ends without [DONE]."""
        begun = False
        try:
            async with aclosing(self._updates(prepared, choices)) as updates:
                async for update in updates:
                    if not update.is_empty or not begun:
                        begun = True
                        yield b"".join(map(sse, reply.chunks(update)))
            if reply.include_usage:
                yield sse(reply.usage_chunk(usage(prepared.prompt_tokens, choices, prepared.body.n or 1)))
            yield SSE_DONE
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, GenerationError | EngineUnavailableError):
                logger.exception("reply %s broke off", reply.id)
            message = str(error) if isinstance(error, GenerationError | EngineUnavailableError) else "internal error"
            yield sse(APIError(message, kind="server_error", code="generation_failed").body())

    async def _updates(self, prepared: Prepared, choices: Sequence[Choice]) -> AsyncGenerator[Update, None]:
        """What the engine's deltas add to the choices, until every choice has finished. A choice that meets a stop string ends its engine stream."""
        streams = DeltaStreams(self._engine, prepared.requests)
        try:
            open_choices = len(choices)
            while open_choices:
                index, delta = await streams.next()
                if choices[index].finish_reason is not None:
                    continue  # queued before its stream was closed
                update = choices[index].feed(delta)
                if update.finish_reason is not None:
                    open_choices -= 1
                    await streams.close(index)
                yield update
        finally:
            await streams.aclose()


class DeltaStreams:
    """The engine's streams of one HTTP request, read side by side."""

    def __init__(self, engine: EngineClient, requests: Sequence[GenerationRequest]) -> None:
        self._queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue(maxsize=2 * len(requests))
        self._tasks = [asyncio.ensure_future(self._pump(engine, i, request)) for i, request in enumerate(requests)]

    async def next(self) -> tuple[int, Delta]:
        """The next delta of any stream. Raises what a stream raised; GenerationError if one ended without a finish reason."""
        index, item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return index, item

    async def close(self, index: int) -> None:
        """Ends one stream, and has aborted its request when it returns."""
        await _cancelled(self._tasks[index])

    async def aclose(self) -> None:
        await _cancelled(*self._tasks)

    async def _pump(self, engine: EngineClient, index: int, request: GenerationRequest) -> None:
        try:
            async with aclosing(cast("AsyncGenerator[Delta, None]", engine.generate(request))) as deltas:
                async for delta in deltas:
                    await self._queue.put((index, delta))
                    if delta.finish_reason is not None:
                        return
            raise GenerationError("the engine's stream ended without a finish reason")
        except Exception as error:
            await self._queue.put((index, error))


class EventStream(Response):
    """A server-sent event stream. Watches for the client's going away while it sends, and closes the events whatever happens."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._first = first
        self._events = events
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _until_disconnect(receive, self._send(send))
        except (ClientDisconnect, OSError):
            logger.info("request %s: the client went away in mid-stream", scope.get("state", {}).get("request_id"))
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, counted while it comes in. Raises APIError 413 above `limit` bytes, 415 for a wrong content type."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise APIError(f"content-type: expected application/json, got {kind[:100]!r}", status=415, param="content-type")
    too_large = APIError(f"the body is larger than {limit} bytes", status=413, code="request_too_large", headers={"connection": "close"})
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def _until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The work's result. Raises ClientDisconnect, with the work cancelled and cleaned up, when the client goes away first. The request's body must
    have been read."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _cancelled(task, watcher)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancels the tasks and returns when they have cleaned up. What they raise is of no interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await events.__anext__()


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return _json(error.body(), error.status, error.headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    known = {404: (f"no such path: {path}", "not_found"), 405: (f"{request.method} is not allowed for {path}", "method_not_allowed")}
    message, code = known.get(error.status_code, (str(error.detail), None))
    return _json(APIError(message, code=code).body(), error.status_code, dict(error.headers or {}))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    logger.info("request %s: the client went away", request.state.request_id)
    return Response(status_code=499)  # nobody reads it


async def _on_exception(request: Request, error: Exception) -> Response:
    logger.error("request %s failed", getattr(request.state, "request_id", "?"), exc_info=error)
    # Starlette answers this one outside the middlewares, so the id is set here.
    headers = {"x-request-id": getattr(request.state, "request_id", "")}
    return _json(APIError("internal error", kind="server_error", code="internal_error").body(), 500, headers)
