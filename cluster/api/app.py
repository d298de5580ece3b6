"""The OpenAI-compatible HTTP application: which route is answered by whom, and what becomes of errors. Knows nothing
about Ray or about how tokens are made."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from isotherm.cluster.api.about import About
from isotherm.cluster.api.access.middleware import AccessMiddleware
from isotherm.cluster.api.admin import AdminClient, admin_routes
from isotherm.cluster.api.batches.routes import batch_routes, refused_routes
from isotherm.cluster.api.batches.service import BatchService
from isotherm.cluster.api.cors import cors
from isotherm.cluster.api.described import described_routes
from isotherm.cluster.api.engine_client import EngineClient
from isotherm.cluster.api.error_forms import error_body
from isotherm.cluster.api.errors import ReplyError, unavailable
from isotherm.cluster.api.events import Events
from isotherm.cluster.api.generation import GenerationRoute, Generator
from isotherm.cluster.api.messages import messages_routes
from isotherm.cluster.api.middleware import PathMiddleware, RequestIdMiddleware, UnexpectedErrorMiddleware
from isotherm.cluster.api.observed import Observer, observed_routes
from isotherm.cluster.api.one_process import OneProcess
from isotherm.cluster.api.page.bundle import page_routes
from isotherm.cluster.api.prepare_chat import prepare_chat
from isotherm.cluster.api.prepare_completion import prepare_completion
from isotherm.cluster.api.replies import json_response
from isotherm.cluster.api.request_book import RequestBook
from isotherm.cluster.api.response_store import MemoryResponseStore, ResponseStore
from isotherm.cluster.api.responses import responses_routes
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.api.tokenization import Tokenization
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
CHAT = GenerationRoute("chatcmpl-", prepare_chat)
COMPLETION = GenerationRoute("cmpl-", prepare_completion, blocks=False)
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")  # that rows of a batch may ask


def build_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    model_id: str,
    aliases: Sequence[str] = (),
    settings: AppSettings | None = None,
    admin: AdminClient | None = None,
    store: ResponseStore | None = None,
    batches: BatchService | None = None,
    observer: Observer | None = None,
    ends: Callable[[], bool] = lambda: False,
) -> Starlette:
    """The ASGI application that serves one model under `model_id` and its aliases; with `admin`, the operator's routes
    too, and with `batches` those for files and batches, which are run here. Without a `store` responses are kept in
    this process. With an `observer` there are metrics, and it is told of every request for tokens. `ends`: whether this
    server is about to end, and what would go on for ever has to end too."""
    settings = settings or AppSettings()
    store = store or MemoryResponseStore(settings.kept_response_bytes)
    names = tuple(dict.fromkeys([model_id, *aliases]))
    book = RequestBook() if observer is None else observer.book
    generator = Generator(engine, tokenizer, names, settings, book)
    tokenization = Tokenization(generator, settings.max_body_bytes)

    def generate(path: str, route: GenerationRoute) -> Route:
        return Route(path, partial(_generate, generator, route), methods=["POST"])

    app = Starlette(
        routes=[
            *About(engine, names, settings).routes(),
            generate("/v1/chat/completions", CHAT),
            generate("/v1/completions", COMPLETION),
            *responses_routes(generator, store),
            *messages_routes(generator),
            Route("/tokenize", tokenization.tokenize, methods=["POST"]),
            Route("/detokenize", tokenization.detokenize, methods=["POST"]),
            *(batch_routes(batches, ENDPOINTS) if batches is not None else refused_routes(settings.batches_refused)),
            *(observed_routes(observer) if observer is not None else []),
            *(admin_routes(admin) if admin is not None else []),
            Events(admin or OneProcess(engine, model_id), settings.silence_s, ends).route(),
            *page_routes(),
            *described_routes(),
        ],
        # Outermost first.
        middleware=[
            Middleware(RequestIdMiddleware),
            *cors(settings.cors),
            Middleware(UnexpectedErrorMiddleware),
            Middleware(PathMiddleware),
            Middleware(AccessMiddleware, access=settings.access, keys=settings.keys, limited=book.refuse),
        ],
        exception_handlers=_error_handlers(),
    )
    if batches is not None:
        batches.serve_with(app, engine.capacity)
    return app


def _error_handlers() -> dict[Any, Callable[[Request, Exception], Awaitable[Response]]]:
    return {
        ReplyError: _on_reply_error,
        HTTPException: _on_http_exception,
        ClientDisconnect: _on_disconnect,
        WorkerGoneError: _on_gone,
    }


async def _generate(generator: Generator, route: GenerationRoute, request: Request) -> Response:
    return await generator.reply(request, route)


async def _on_reply_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ReplyError)
    return json_response(error_body(request.url.path, error), error.status, error.headers)


async def _on_gone(request: Request, error: Exception) -> Response:
    """The controller is being replaced: an operator's request finds the next one."""
    return await _on_reply_error(request, unavailable(str(error)))


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
    said = ReplyError(message, code=code, status=error.status_code)
    return json_response(error_body(request.url.path, said), error.status_code, allowed)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    logger.info("request %s: the client went away", request.state.request_id)
    return Response(status_code=499)  # nobody reads it
