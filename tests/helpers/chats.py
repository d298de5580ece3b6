"""Chats with the bundled model that are held to schemas, call tools, think and have several choices, as streams over
HTTP; and what each gets from an engine in this process."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import httpx
from streams import Stream

from isotherm.cluster.local.server import serve_in_process

NUMBERS = {
    "type": "array",
    "items": {"type": "integer", "minimum": -999, "maximum": 999},
    "minItems": 24,
    "maxItems": 24,
}
TABLE = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "rows": NUMBERS},
    "required": ["name", "rows"],
    "additionalProperties": False,
}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "Keep it.", "parameters": TABLE}}


# Each long enough that whatever is done to the cluster meets it on its way.
KINDS: dict[str, dict[str, Any]] = {
    "schema, 4 choices": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "table", "schema": TABLE}},
        "n": 4,
    },
    "two tools to call": {"tools": [tool("keep"), tool("store")], "tool_choice": "required"},
    "one call, 2 choices": {"tools": [tool("keep")], "tool_choice": "required", "parallel_tool_calls": False, "n": 2},
    "a thought, then a schema": {
        "thinking": True,
        "max_thinking_tokens": 40,
        "response_format": {"type": "json_schema", "json_schema": {"name": "table", "schema": TABLE}},
    },
    "an expression": {"structured_outputs": {"regex": "([a-z]{2,6} ){30}"}, "logprobs": True},
    "penalties": {"presence_penalty": 0.8, "repetition_penalty": 1.2, "bad_words": ["the"], "ignore_eos": True},
}


class ChatWorkload:
    """`count` chats, of all kinds in turn."""

    def __init__(self, count: int, max_tokens: int = 220):
        self.bodies = []
        for i, kind in zip(range(count), itertools.cycle(KINDS.values()), strict=False):
            asked = {"model": "tiny", "messages": [{"role": "user", "content": f"What is {i} + 5?"}], "seed": i}
            self.bodies.append(
                asked | {"max_tokens": max_tokens, "temperature": float(i % 3 > 0), "stream": True} | kind
            )

    def alone(self) -> list[str]:
        """What each is given by an engine of its own, one after the other."""
        server = serve_in_process("tiny")
        try:
            return asyncio.run(self._one_by_one(server.socket))
        finally:
            server.close()

    async def _one_by_one(self, socket: str) -> list[str]:
        transport = httpx.AsyncHTTPTransport(uds=socket)
        async with httpx.AsyncClient(base_url="http://local", transport=transport, timeout=200) as client:
            streams = [await self._ask(client, body) for body in self.bodies]
        assert all(stream.done and not stream.error for stream in streams), streams
        return [stream.text for stream in streams]

    async def serve(self, url: str, silence: float = 200) -> list[Stream]:
        """All of them at once. `silence`: seconds without a word after which a stream is given up."""
        async with httpx.AsyncClient(
            base_url=url, timeout=silence, limits=httpx.Limits(max_connections=None)
        ) as client:
            return list(await asyncio.gather(*(self._ask(client, body) for body in self.bodies)))

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Stream:
        stream = Stream()
        chunks: list[dict[str, Any]] = []
        times = [time.perf_counter()]
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    stream.error = f"HTTP {response.status_code}: {(await response.aread()).decode()}"
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        stream.done = True
                    elif line.startswith("data: "):
                        chunk = json.loads(line.removeprefix("data: "))
                        stream.error = stream.error or str(chunk.get("error", ""))
                        chunks.append(chunk)
                        times.append(time.perf_counter())
        except httpx.TransportError as error:
            stream.cut = repr(error)
        stream.first, *stream.gaps = [later - at for at, later in itertools.pairwise(times)] or [0.0]
        stream.text = told(chunks)
        return stream


def told(chunks: Sequence[dict[str, Any]]) -> str:
    """All that the chunks say of each choice, field by field."""
    fields: dict[tuple[Any, ...], list[str]] = {}
    for choice in (choice for chunk in chunks for choice in chunk.get("choices", ())):
        at, delta = choice["index"], choice["delta"]
        for name in ("content", "reasoning_content"):
            fields.setdefault((at, name), []).append(delta.get(name) or "")
        for call in delta.get("tool_calls", ()):
            for name, text in {"id": call.get("id"), **call["function"]}.items():
                if name != "id":  # it is made of the reply's id
                    fields.setdefault((at, "call", call["index"], name), []).append(text or "")
        for entry in (choice.get("logprobs") or {}).get("content") or ():
            fields.setdefault((at, "logprobs"), []).append(repr(entry))
        fields.setdefault((at, "finish"), []).append(choice["finish_reason"] or "")
    return json.dumps({repr(key): "".join(parts) for key, parts in sorted(fields.items(), key=repr)}, indent=1)
