"""Serve's proxy without an application: a 503 that says when to ask again. The application's own answers stay."""

from __future__ import annotations

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from isotherm.cluster.api.middleware import serve_proxy_middlewares
from isotherm.cluster.api.unrouted import UnroutedMiddleware


def client() -> TestClient:
    def unrouted(_request):
        return PlainTextResponse("Path '/' not found. Ping http://.../-/routes for available routes.", 404)

    def routed(_request):
        return JSONResponse({"error": {"message": "no such path"}}, 404)

    def streamed(_request):
        return StreamingResponse(iter([b"a", b"b"]), media_type="text/event-stream")

    app = Starlette(
        routes=[
            Route("/unrouted", unrouted),
            Route("/v1/messages", unrouted),
            Route("/routed", routed),
            Route("/streamed", streamed),
        ]
    )
    return TestClient(UnroutedMiddleware(app))


def test_serves_own_404_is_a_503():
    answer = client().get("/unrouted")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert answer.json()["error"]["code"] == "unavailable" and "routes" not in answer.text
    assert client().get("/v1/messages").json()["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize(("path", "status", "text"), [("/routed", 404, "no such path"), ("/streamed", 200, "ab")])
def test_the_applications_answers_stay(path: str, status: int, text: str):
    answer = client().get(path)
    assert answer.status_code == status and text in answer.text and "retry-after" not in answer.headers


def test_serves_proxy_has_it():
    assert UnroutedMiddleware in [middleware.cls for middleware in serve_proxy_middlewares()]


def test_what_is_not_http_passes():
    seen = []

    async def inner(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(UnroutedMiddleware(inner)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
