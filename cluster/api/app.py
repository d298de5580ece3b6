"""The OpenAI-compatible HTTP application: routes, request bodies, streams, disconnects. Knows nothing about Ray or
about how tokens are made."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from isotherm.cluster.api.access import Access, AccessMiddleware
from isotherm.cluster.api.admin import AdminClient, admin_routes
from isotherm.cluster.api.admission import Admission
from isotherm.cluster.api.body import read_body
from isotherm.cluster.api.choices import ChoiceDelta, ChoiceStream, GenerationError, merged
from isotherm.cluster.api.engine_client import EngineClient, EngineOverloadedError, EngineUnavailableError
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.gate import CAPACITY_HEADER, overloaded
from isotherm.cluster.api.middleware import PathMiddleware, RequestIdMiddleware
from isotherm.cluster.api.prepare import OPENAI_DEFAULTS, Prepared, PromptLimits, prepare_chat, prepare_completion
from isotherm.cluster.api.replies import SSE_DONE, Reply, sse, to_json, usage
from isotherm.cluster.api.stream import EventStream, cancelled, until_disconnect
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.messages.requests import Delta, GenerationRequest
from isotherm.cluster.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
_INLINE_BYTES = 16 * 1024  # a completions body up to this size is tokenised in well under a millisecond: no thread


@dataclass(frozen=True)
class AppSettings:
    """Limits of the front door."""

    max_body_bytes: int = 8 << 20
    max_prompt_chars_per_token: int = 16  # × max_model_len: more characters than that are refused before tokenising
    retry_after_s: int = 1  # with a 503
    first_event_s: float = 0.2  # a stream's status line waits so long for its first event: a refusal is still a status
    access: Access = field(default_factory=Access)
    # What bodies that do not say are taken to ask for, by the names of SamplingParams; `max_tokens` among them
    defaults: Mapping[str, Any] = field(default_factory=dict)
    silence_s: float = 5.0  # after so long without an event a stream has a comment


def build_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    model_id: str,
    aliases: Sequence[str] = (),
    settings: AppSettings | None = None,
    admin: AdminClient | None = None,
) -> Starlette:
    """The ASGI application that serves one model under `model_id` and its aliases; with `admin`, the operator's routes
    too."""
    settings = settings or AppSettings()
    door = FrontDoor(engine, tokenizer, model_id, aliases, settings)
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
        middleware=[
            Middleware(RequestIdMiddleware),
            Middleware(PathMiddleware),
            Middleware(AccessMiddleware, access=settings.access),
        ],
        exception_handlers={
            ReplyError: _on_api_error,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_disconnect,
            WorkerGoneError: _on_gone,
            Exception: _on_exception,
        },
    )


class FrontDoor:
    """The endpoints. Holds what every request needs, and counts those that are open."""

    def __init__(
        self, engine: EngineClient, tokenizer: Tokenizer, model_id: str, aliases: Sequence[str], settings: AppSettings
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._models = tuple(dict.fromkeys([model_id, *aliases]))
        self._settings = settings
        self._admission = Admission(random.random)
        self._created = int(time.time())
        self._version = importlib.metadata.version("isotherm")

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model(name) for name in self._models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._models:
            raise ReplyError(
                f"model: {name[:100]!r} is not served here", status=404, param="model", code="model_not_found"
            )
        return _json(self._model(name))

    async def health(self, request: Request) -> Response:
        return _json({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        reason = self._engine.not_ready()
        return (
            _json({"status": "ready"})
            if reason is None
            else _json({"status": "not ready", "reason": reason}, 503, self._retry_after)
        )

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

    def _model(self, name: str) -> JSON:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "isotherm",
            "root": self._models[0],
            "max_model_len": self._engine.max_model_len,
            "vocab_size": self._engine.vocab_size,
            "default_sampling": {**OPENAI_DEFAULTS, **self._settings.defaults},
        }

    async def _reply(self, request: Request, prepare: Callable[..., Prepared], prefix: str) -> Response:
        with ExitStack() as places:
            self._admit(1, places)  # before the body costs anything
            prepared = await self._prepared(request, prepare, prefix)
            if (count := len(prepared.requests)) > (capacity := self._engine.capacity()):
                message = f"n: {count} choices are more than the {capacity} that this server takes at once"
                raise ReplyError(message, param="n")
            if count > 1:
                self._admit(count - 1, places)
            reply = await self._answer(request, prepared, prefix == "chatcmpl")
            if isinstance(reply, EventStream):
                reply.on_close(places.pop_all().close)
            reply.headers[CAPACITY_HEADER.decode()] = str(self._engine.capacity())
            return reply

    def _admit(self, count: int, places: ExitStack) -> None:
        """Takes places for so many of the engine's streams. Raises ReplyError 429."""
        capacity, clock = self._engine.capacity(), time.monotonic
        if not self._admission.enter(count, capacity, clock()):
            raise self._overloaded(f"{self._admission.open} requests are running or waiting, and {capacity} may")
        places.callback(lambda: self._admission.leave(count, clock()))

    def _overloaded(self, reason: str) -> ReplyError:
        return overloaded(reason, self._admission.retry_after(time.monotonic()))

    async def _prepared(self, request: Request, prepare: Callable[..., Prepared], prefix: str) -> Prepared:
        raw = await read_body(request, self._settings.max_body_bytes)
        reply_id = f"{prefix}-{uuid.uuid4().hex}"
        max_model_len = self._engine.max_model_len
        limits = PromptLimits(
            max_model_len, self._engine.vocab_size, max_model_len * self._settings.max_prompt_chars_per_token
        )
        prepare = partial(prepare, raw, reply_id, self._models, self._tokenizer, limits, self._settings.defaults)
        inline = prefix == "cmpl" and len(raw) <= _INLINE_BYTES
        return prepare() if inline else await asyncio.to_thread(prepare)

    async def _answer(self, request: Request, prepared: Prepared, chat: bool) -> Response:
        body = prepared.body
        choices = [
            ChoiceStream(
                i,
                generation,
                self._tokenizer,
                prepared.new_parser(),
                stop=body.stops,
                skip_special_tokens=body.skip_special_tokens is not False,
                chat=chat,
                echo=prepared.echo[i],
            )
            for i, generation in enumerate(prepared.requests)
        ]
        reply = Reply(
            prepared.id,
            body.model,
            int(time.time()),
            self._engine.system_fingerprint or None,
            chat=chat,
            include_usage=bool(body.stream and body.include_usage),
        )
        try:
            if not body.stream:
                return _json(await until_disconnect(request.receive, self._collect(prepared, choices, reply)))
            events = self._events(prepared, choices, reply)
            stream = EventStream(events, partial(self._error_event, reply.id), self._settings.silence_s)
            await stream.first_event(request.receive, self._settings.first_event_s)
            return stream
        except (EngineUnavailableError, GenerationError) as error:
            raise self._engine_error(error) from error

    def _engine_error(self, error: EngineUnavailableError | GenerationError) -> ReplyError:
        if isinstance(error, EngineOverloadedError):
            return self._overloaded(str(error))
        if isinstance(error, EngineUnavailableError):
            message = str(error) or "the model can't be served right now"
            return ReplyError(message, status=503, kind="server_error", code="unavailable", headers=self._retry_after)
        return ReplyError(str(error), status=500, kind="server_error", code="generation_failed")

    def _error_event(self, reply_id: str, error: Exception) -> bytes:
        """What a stream that has begun ends with."""
        if isinstance(error, GenerationError | EngineUnavailableError):
            return sse(self._engine_error(error).body())
        logger.error("reply %s broke off", reply_id, exc_info=error)
        return sse(ReplyError("internal error", kind="server_error", code="internal_error").body())

    async def _collect(self, prepared: Prepared, choices: Sequence[ChoiceStream], reply: Reply) -> JSON:
        parts: list[list[ChoiceDelta]] = [[] for _ in choices]
        async with aclosing(self._deltas(prepared, choices)) as stream:
            async for delta in stream:
                parts[delta.index].append(delta)
        used = usage(prepared.prompt_tokens, choices, prepared.body.n or 1)
        return reply.whole([merged(part) for part in parts], used)

    async def _events(
        self, prepared: Prepared, choices: Sequence[ChoiceStream], reply: Reply
    ) -> AsyncGenerator[bytes, None]:
        """The server-sent events, one bytes object per delta."""
        begun = False
        async with aclosing(self._deltas(prepared, choices)) as deltas:
            async for delta in deltas:
                if not delta.is_empty or not begun:
                    begun = True
                    yield b"".join(map(sse, reply.chunks(delta)))
        if reply.include_usage:
            yield sse(reply.usage_chunk(usage(prepared.prompt_tokens, choices, prepared.body.n or 1)))
        yield SSE_DONE

    async def _deltas(self, prepared: Prepared, choices: Sequence[ChoiceStream]) -> AsyncGenerator[ChoiceDelta, None]:
        """What the engine's deltas add to the choices, until every choice has finished. A choice that meets a stop
        string ends its engine stream."""
        streams = DeltaStreams(self._engine, prepared.requests)
        try:
            open_choices = len(choices)
            while open_choices:
                index, delta = await streams.next()
                if choices[index].finish_reason is not None:
                    continue  # queued before its stream was closed
                added = choices[index].feed(delta)
                if added.finish_reason is not None:
                    open_choices -= 1
                    await streams.close(index)
                yield added
        finally:
            await streams.aclose()


class DeltaStreams:
    """The engine's streams of one HTTP request, read side by side."""

    def __init__(self, engine: EngineClient, requests: Sequence[GenerationRequest]) -> None:
        self._queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue(maxsize=2 * len(requests))
        self._tasks = [asyncio.ensure_future(self._pump(engine, i, request)) for i, request in enumerate(requests)]

    async def next(self) -> tuple[int, Delta]:
        """The next delta of any stream. Raises what a stream raised; GenerationError if one ended without a finish
        reason."""
        index, item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return index, item

    async def close(self, index: int) -> None:
        """Ends one stream, and has aborted its request when it returns."""
        await cancelled(self._tasks[index])

    async def aclose(self) -> None:
        await cancelled(*self._tasks)

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


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ReplyError)
    return _json(error.body(), error.status, error.headers)


async def _on_gone(request: Request, error: Exception) -> Response:
    """The controller is being replaced: an operator's request finds the next one."""
    away = ReplyError(str(error), status=503, kind="server_error", code="unavailable", headers={"retry-after": "1"})
    return _json(away.body(), away.status, away.headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = dict(error.headers or {})
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers=allowed)
    path = request.url.path[:200]
    known = {
        404: (f"no such path: {path}", "not_found"),
        405: (f"{request.method} is not allowed for {path}", "method_not_allowed"),
    }
    message, code = known.get(error.status_code, (str(error.detail), None))
    return _json(ReplyError(message, code=code).body(), error.status_code, allowed)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    logger.info("request %s: the client went away", request.state.request_id)
    return Response(status_code=499)  # nobody reads it


async def _on_exception(request: Request, error: Exception) -> Response:
    logger.error("request %s failed", getattr(request.state, "request_id", "?"), exc_info=error)
    # Starlette answers this one outside the middlewares, so the id is set here.
    headers = {"x-request-id": getattr(request.state, "request_id", "")}
    return _json(ReplyError("internal error", kind="server_error", code="internal_error").body(), 500, headers)
