"""The client for asyncio: the calls of `Client`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import httpx
from typing_extensions import Unpack

from isotherm.cluster.client import in_process
from isotherm.cluster.client.answers import Chunk, Completion, RawResponse
from isotherm.cluster.client.batch import (
    CONCURRENCY,
    LOW_PRIORITY,
    BatchOptions,
    BatchSummary,
    ProgressCallback,
    run_batch,
    run_rows,
)
from isotherm.cluster.client.batch_output import BatchResult
from isotherm.cluster.client.calls import DEFAULT_URL, LIMITS, Call, Calls, Pause, http_options
from isotherm.cluster.client.errors import StreamBrokenError
from isotherm.cluster.client.feed import PATH as FEED
from isotherm.cluster.client.feed import ClusterState, FeedReader
from isotherm.cluster.client.operations import OperationEvent, OperationEvents
from isotherm.cluster.client.params import (
    AutoscalerMode,
    ChatParams,
    CompletionParams,
    Messages,
    ModelInfo,
    Operation,
    Prompt,
    RollTarget,
    ScaleTarget,
)
from isotherm.cluster.client.tries import Send, StreamedReply
from isotherm.cluster.jsontypes import JSON

_T = TypeVar("_T")


class AsyncStream:
    """As Stream, awaited; `aclose`, or leaving it as a context manager, ends the request at the server too."""

    def __init__(self, pieces: AsyncGenerator[Chunk, None], reply: StreamedReply) -> None:
        self._pieces, self._reply = pieces, reply

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Chunk:
        """As Stream.__next__."""
        return await self._pieces.__anext__()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._pieces.aclose()

    @property
    def completion(self) -> Completion:
        """As Stream.completion."""
        return self._reply.completion

    async def rest(self) -> Completion:
        """As Stream.rest."""
        async for _ in self:
            pass
        return self.completion


class AsyncClient:
    """As Client. A streaming call is awaited too: `async for chunk in await client.chat("…", stream=True)`; `stream` is
    not: `async with client.stream("…") as stream: async for chunk in stream: …`."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**http_options(base_url, api_key, timeout, transport))
        self._calls = Calls(self.base_url, max_retries)
        self._server: in_process.LocalServer | None = None

    @classmethod
    async def local(cls, model: str = "tiny", *, timeout: float = 600.0, max_retries: int = 2) -> AsyncClient:
        """As Client.local; awaited, for it takes as long as loading the model does."""
        server = await asyncio.to_thread(in_process.start, model)
        transport = httpx.AsyncHTTPTransport(uds=server.socket, limits=LIMITS)
        client = cls(in_process.URL, timeout=timeout, max_retries=max_retries, transport=transport)
        client._server = server
        return client

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
        if self._server is not None:
            await asyncio.to_thread(self._server.close)

    # --- generation -------------------------------------------------------------------------------

    @overload
    async def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **params: Unpack[ChatParams]
    ) -> Completion: ...
    @overload
    async def chat(self, messages: Messages, *, stream: Literal[True], **params: Unpack[ChatParams]) -> AsyncStream: ...
    async def chat(
        self, messages: Messages, *, stream: bool = False, **params: Unpack[ChatParams]
    ) -> Completion | AsyncStream:
        """As Client.chat."""
        if stream:
            return self._streamed(self._calls.chat_request(messages, params))
        return await self._run(self._calls.chat(messages, params))

    def stream(self, messages: Messages, **params: Unpack[ChatParams]) -> AsyncStream:
        """As Client.stream."""
        return self._streamed(self._calls.chat_request(messages, params))

    @overload
    async def complete(
        self, prompt: Prompt, *, stream: Literal[False] = False, **params: Unpack[CompletionParams]
    ) -> Completion: ...
    @overload
    async def complete(
        self, prompt: Prompt, *, stream: Literal[True], **params: Unpack[CompletionParams]
    ) -> AsyncStream: ...
    async def complete(
        self, prompt: Prompt, *, stream: bool = False, **params: Unpack[CompletionParams]
    ) -> Completion | AsyncStream:
        """As Client.complete."""
        if stream:
            return self._streamed(self._calls.completion_request(prompt, params))
        return await self._run(self._calls.complete(prompt, params))

    async def parse(self, messages: Messages, kind: type[_T], **params: Unpack[ChatParams]) -> _T:
        """As Client.parse."""
        return await self._run(self._calls.parse(messages, kind, params))

    # --- many requests ----------------------------------------------------------------------------

    async def batch(
        self, rows: Iterable[Any], *, concurrency: int = CONCURRENCY, priority: int = LOW_PRIORITY
    ) -> list[BatchResult]:
        """As Client.batch."""
        return await run_rows(rows, self, BatchOptions(concurrency, priority))

    async def batch_files(
        self,
        inputs: str | Path | Sequence[str | Path],
        output: str | Path,
        *,
        concurrency: int = CONCURRENCY,
        priority: int = LOW_PRIORITY,
        progress: ProgressCallback | None = None,
    ) -> BatchSummary:
        """As Client.batch_files."""
        options = BatchOptions(concurrency, priority)
        return await run_batch(inputs, Path(output), self, options, progress)

    # --- models and tokens ------------------------------------------------------------------------

    async def models(self) -> list[str]:
        return await self._run(self._calls.models())

    async def model(self, name: str | None = None) -> ModelInfo:
        """As Client.model."""
        return await self._run(self._calls.model_info(name))

    async def tokenize(self, text: Messages, *, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """As Client.tokenize."""
        return await self._run(self._calls.tokenize(text, add_special_tokens, options))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        return await self._run(self._calls.detokenize(tokens))

    # --- the cluster ------------------------------------------------------------------------------

    async def ready(self) -> bool:
        """As Client.ready."""
        return await self._run(self._calls.ready())

    async def status(self) -> JSON:
        """As Client.status."""
        return await self._run(self._calls.get("/status"))

    async def scale(
        self, *, dry_run: bool = False, idempotency_key: str | None = None, **target: Unpack[ScaleTarget]
    ) -> Operation:
        """As Client.scale."""
        return await self._run(self._calls.scale(dry_run, idempotency_key, target))

    async def roll(
        self,
        model: str | None = None,
        *,
        manifest: Mapping[str, Any] | None = None,
        dry_run: bool = False,
        idempotency_key: str | None = None,
        **target: Unpack[RollTarget],
    ) -> Operation:
        """As Client.roll."""
        return await self._run(self._calls.roll(model, manifest, dry_run, idempotency_key, target))

    async def operation(self, operation_id: str) -> Operation:
        """As Client.operation."""
        return await self._run(self._calls.operation(operation_id))

    async def operations(self) -> list[Operation]:
        """As Client.operations."""
        return await self._run(self._calls.operations())

    async def wait_for_operation(
        self, operation_id: str, timeout: float = 600.0, at_each_look: Callable[[Operation], None] | None = None
    ) -> Operation:
        """As Client.wait_for_operation."""
        return await self._run(self._calls.wait_for_operation(operation_id, timeout, at_each_look))

    async def events(self) -> AsyncIterator[OperationEvent]:
        """As Client.events."""
        events = OperationEvents()
        async with aclosing(self.feed()) as states:
            async for state in states:
                for event in events.new(state.operations()) if not state.trouble else ():
                    yield event

    async def feed(self) -> AsyncGenerator[ClusterState, None]:
        """As Client.feed."""
        reader = FeedReader(self.base_url)
        while True:
            trouble: Exception | None = None
            try:
                async with self._http.stream("GET", FEED, headers=reader.headers) as response:
                    if response.status_code != 200:
                        await response.aread()
                    reader.begin(response)
                    async for data in response.aiter_bytes():
                        for state in reader.feed(data):
                            yield state
            except (httpx.TransportError, StreamBrokenError) as error:
                trouble = error
            pause = reader.broken(trouble)
            yield reader.state
            await asyncio.sleep(pause)

    async def experts(self) -> JSON:
        """As Client.experts."""
        return await self._run(self._calls.get("/admin/experts"))

    async def autoscaler(self) -> JSON:
        """As Client.autoscaler."""
        return await self._run(self._calls.get("/admin/autoscaler"))

    async def set_autoscaler(self, mode: AutoscalerMode) -> JSON:
        """As Client.set_autoscaler."""
        return await self._run(self._calls.post("/admin/autoscaler", {"mode": mode}))

    async def request(self, method: str, path: str, body: Any = None, *, retry: bool = True) -> RawResponse:
        """As Client.request."""
        return await self._run(self._calls.request(method, path, body, retry))

    # --- how --------------------------------------------------------------------------------------

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

    def _streamed(self, request: Call[Send]) -> AsyncStream:
        reply = self._calls.streamed()
        return AsyncStream(self._pieces(self._calls.stream_request(request), reply), reply)

    async def _pieces(self, call: Call[Send], reply: StreamedReply) -> AsyncGenerator[Chunk, None]:
        request = await self._run(call)
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
