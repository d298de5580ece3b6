"""The client for asyncio: the calls of `Client`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal, TypeVar, overload

import httpx

from isotherm.cluster.client.answers import Chunk, Completion, RawResponse
from isotherm.cluster.client.calls import DEFAULT_URL, Call, Calls, Messages, Pause, Prompt, Send, http_options
from isotherm.cluster.jsontypes import JSON

_T = TypeVar("_T")


class AsyncClient:
    """As Client. A streaming call is awaited too: `async for chunk in await client.chat("…", stream=True)`."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**http_options(base_url, api_key, timeout), transport=transport)
        self._calls = Calls(self.base_url, max_retries)

    @property
    def base_url(self) -> str:
        """As Client.base_url."""
        return str(self._http.base_url).rstrip("/")

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    @overload
    async def chat(self, messages: Messages, *, stream: Literal[False] = False, **params: Any) -> Completion: ...
    @overload
    async def chat(self, messages: Messages, *, stream: Literal[True], **params: Any) -> AsyncIterator[Chunk]: ...
    async def chat(
        self, messages: Messages, *, stream: bool = False, **params: Any
    ) -> Completion | AsyncIterator[Chunk]:
        """As Client.chat."""
        if stream:
            return self._stream(await self._run(self._calls.chat_request(messages, params)))
        return await self._run(self._calls.chat(messages, params))

    @overload
    async def complete(self, prompt: Prompt, *, stream: Literal[False] = False, **params: Any) -> Completion: ...
    @overload
    async def complete(self, prompt: Prompt, *, stream: Literal[True], **params: Any) -> AsyncIterator[Chunk]: ...
    async def complete(
        self, prompt: Prompt, *, stream: bool = False, **params: Any
    ) -> Completion | AsyncIterator[Chunk]:
        """As Client.complete."""
        if stream:
            return self._stream(await self._run(self._calls.completion_request(prompt, params)))
        return await self._run(self._calls.complete(prompt, params))

    async def models(self) -> list[str]:
        return await self._run(self._calls.models())

    async def ready(self) -> bool:
        """As Client.ready."""
        return await self._run(self._calls.ready())

    async def status(self) -> JSON:
        """As Client.status."""
        return await self._run(self._calls.get("/status"))

    async def scale(self, *, dry_run: bool = False, idempotency_key: str | None = None, **target: Any) -> JSON:
        """As Client.scale."""
        return await self._run(self._calls.scale(dry_run, idempotency_key, target))

    async def operation(self, operation_id: str) -> JSON:
        """As Client.operation."""
        return await self._run(self._calls.operation(operation_id))

    async def wait_for_operation(self, operation_id: str, timeout: float = 600.0) -> JSON:
        """As Client.wait_for_operation."""
        return await self._run(self._calls.wait_for_operation(operation_id, timeout))

    async def experts(self) -> JSON:
        """As Client.experts."""
        return await self._run(self._calls.get("/admin/experts"))

    async def autoscaler(self) -> JSON:
        """As Client.autoscaler."""
        return await self._run(self._calls.get("/admin/autoscaler"))

    async def request(self, method: str, path: str, body: Any = None, *, retry: bool = True) -> RawResponse:
        """As Client.request."""
        return await self._run(self._calls.request(method, path, body, retry))

    async def _run(self, call: Call[_T]) -> _T:
        try:
            step = next(call)
            while True:
                try:
                    outcome = await self._act(step)
                except httpx.TransportError as error:
                    step = call.throw(error)
                else:
                    step = call.send(outcome)
        except StopIteration as end:
            result: _T = end.value
            return result

    async def _act(self, step: Send | Pause) -> httpx.Response | None:
        if isinstance(step, Send):
            return await self._http.request(step.method, step.path, json=step.body)
        await asyncio.sleep(step.seconds)
        return None

    async def _stream(self, request: Send) -> AsyncIterator[Chunk]:
        reply = self._calls.streamed(request)
        request = reply.request
        while True:
            try:
                async with self._http.stream(request.method, request.path, json=request.body) as response:
                    if (pause := reply.after_response(response)) is None:
                        if response.status_code != 200:
                            await response.aread()
                            reply.refused(response)
                        async for data in response.aiter_bytes():
                            for chunk in reply.feed(data):
                                yield chunk
                        reply.end()
                        return
            except httpx.TransportError as error:
                pause = reply.after_error(error)
            await asyncio.sleep(pause)
