"""Asks the application that serves here, in this process, as a client would over HTTP."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Scope

from isotherm.cluster.jsontypes import JSON


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Headers
    body: Any  # what its JSON says


async def ask(app: ASGIApp, priority: int, owner: str, path: str, body: JSON) -> Answer:
    """The answer to a POST by the key named `owner`, which has this priority unless its body says another. Cancelled,
    it is as if its client had hung up."""
    content = json.dumps(body, ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {"priority": priority, "owner": owner},
    }
    status, given, parts, sent = 500, Headers(), [b""], False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, given
        if message["type"] == "http.response.start":
            status, given = message["status"], Headers(raw=list(message["headers"]))
        else:
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        # Starlette answers with 500 first, and then tells the server, which has nothing to do here.
        if status != 500:
            raise
    return Answer(status, given, json.loads(b"".join(parts)))
