"""The blocking client of an Isotherm server, or of any server that speaks OpenAI's API. Needs httpx and pydantic alone:
neither torch nor ray.

with Client() as client:
    print(client.chat("What is 3 + 4?").text)
    with client.stream("Count to ten.") as stream:
        for piece in stream:
            print(piece.text, end="")
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import httpx
from typing_extensions import Unpack

from isotherm.cluster.client import in_process
from isotherm.cluster.client.answers import Chunk, Completion, RawResponse
from isotherm.cluster.client.async_client import AsyncClient
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


class Stream:
    """The pieces of one streamed reply. It is asked for when the first piece is; `close`, or leaving it as a context
    manager, ends the request at the server too."""

    def __init__(self, pieces: Iterator[Chunk], reply: StreamedReply) -> None:
        self._pieces, self._reply = pieces, reply

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        """Raises APIError and ConnectionFailedError before the first piece, and StreamBrokenError."""
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pieces.close()  # type: ignore[attr-defined]  # it is a generator

    @property
    def completion(self) -> Completion:
        """What has come so far as one reply: the whole one, after the last piece."""
        return self._reply.completion

    def rest(self) -> Completion:
        """The whole reply, once the pieces that are left have come."""
        for _ in self:
            pass
        return self.completion


class Client:
    """The blocking client, which several threads may use at once. `timeout`: seconds for each wait for data; connecting
    has 10 s of them at most. `max_retries`: tries after the first."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**http_options(base_url, api_key, timeout, transport))
        self._calls = Calls(self.base_url, max_retries)
        self._options: JSON = {"api_key": api_key, "timeout": timeout, "max_retries": max_retries}
        self._transport = transport
        self._server: in_process.LocalServer | None = None

    @classmethod
    def local(cls, model: str = "tiny", *, timeout: float = 600.0, max_retries: int = 2) -> Client:
        """A client with the engine in its own process: no server, no Ray. `model` is a directory, a hub id, "tiny" or a
        manifest, as `isotherm serve` takes them. Returns when the model is loaded; `close` lets go of it."""
        server = in_process.start(model)
        transport = httpx.HTTPTransport(uds=server.socket, limits=LIMITS)
        client = cls(in_process.URL, timeout=timeout, max_retries=max_retries, transport=transport)
        client._server = server
        return client

    @property
    def base_url(self) -> str:
        """Without /v1 and without a slash at its end."""
        return str(self._http.base_url).rstrip("/")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()
        if self._server is not None:
            self._server.close()

    # --- generation -------------------------------------------------------------------------------

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **params: Unpack[ChatParams]
    ) -> Completion: ...
    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **params: Unpack[ChatParams]) -> Stream: ...
    def chat(self, messages: Messages, *, stream: bool = False, **params: Unpack[ChatParams]) -> Completion | Stream:
        """The reply to a chat: a string (one user message) or a list of messages. `params` are OpenAI's request fields;
        without `model` it is the first that the server lists; `tools` may be functions. Raises APIError,
        ConnectionFailedError, and while streaming StreamBrokenError."""
        if stream:
            return self._streamed(self._calls.chat_request(messages, params))
        return self._run(self._calls.chat(messages, params))

    def stream(self, messages: Messages, **params: Unpack[ChatParams]) -> Stream:
        """`chat` with stream=True: `with client.stream(…) as stream: for piece in stream: …`."""
        return self.chat(messages, stream=True, **params)

    @overload
    def complete(
        self, prompt: Prompt, *, stream: Literal[False] = False, **params: Unpack[CompletionParams]
    ) -> Completion: ...
    @overload
    def complete(self, prompt: Prompt, *, stream: Literal[True], **params: Unpack[CompletionParams]) -> Stream: ...
    def complete(
        self, prompt: Prompt, *, stream: bool = False, **params: Unpack[CompletionParams]
    ) -> Completion | Stream:
        """The continuation of a prompt (text, token ids, or a list of either). Otherwise as `chat`."""
        if stream:
            return self._streamed(self._calls.completion_request(prompt, params))
        return self._run(self._calls.complete(prompt, params))

    def parse(self, messages: Messages, kind: type[_T], **params: Unpack[ChatParams]) -> _T:
        """The reply as a value of a type: a pydantic model, a dataclass, `list[int]`, … The server has the model write
        JSON that fits it (`response_format`). Raises OutputCutError where the reply was cut, OutputInvalidError where
        it does not fit all the same, and what `chat` raises."""
        return self._run(self._calls.parse(messages, kind, params))

    # --- many requests ----------------------------------------------------------------------------

    def batch(
        self, rows: Iterable[Any], *, concurrency: int = CONCURRENCY, priority: int = LOW_PRIORITY
    ) -> list[BatchResult]:
        """The results of many requests, in their order: texts (each a chat's one user message), or rows as batch files
        have them: bodies ({"prompt": …}, {"messages": …}) or OpenAI's {"custom_id", "url", "body"}. A row that fails
        has an error in its result, and stops no other. `priority`: of rows that name none; lower values have their turn
        first, and requests that say nothing have 0."""
        return self._run_async(lambda client: run_rows(rows, client, BatchOptions(concurrency, priority)))

    def batch_files(
        self,
        inputs: str | Path | Sequence[str | Path],
        output: str | Path,
        *,
        concurrency: int = CONCURRENCY,
        priority: int = LOW_PRIORITY,
        progress: ProgressCallback | None = None,
    ) -> BatchSummary:
        """What `isotherm batch` does: every row of files in OpenAI's batch format (paths, globs; JSON Lines, also as
        gzip, or Parquet) that `output` has no result for is asked, and its result appended there. `progress` is called
        after each. The results: `read_results(output)`. Raises BatchError, OSError."""
        options = BatchOptions(concurrency, priority)
        return self._run_async(lambda client: run_batch(inputs, Path(output), client, options, progress))

    # --- models and tokens ------------------------------------------------------------------------

    def models(self) -> list[str]:
        return self._run(self._calls.models())

    def model(self, name: str | None = None) -> ModelInfo:
        """What the server says of a model; of the first that it lists, where none is named."""
        return self._run(self._calls.model_info(name))

    def tokenize(self, text: Messages, *, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The token ids of a text, or of a chat as its template writes it (a list of messages; `options` are `tools`,
        `chat_template_kwargs` and other fields that a chat has)."""
        return self._run(self._calls.tokenize(text, add_special_tokens, options))

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self._run(self._calls.detokenize(tokens))

    # --- the cluster ------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether requests can be served now."""
        return self._run(self._calls.ready())

    def status(self) -> JSON:
        """What `isotherm status --json` prints."""
        return self._run(self._calls.get("/status"))

    def scale(
        self, *, dry_run: bool = False, idempotency_key: str | None = None, **target: Unpack[ScaleTarget]
    ) -> Operation:
        """Begin an operation (POST /admin/operations): each number of the target is what there is to be, what is None
        stays as it is; an empty `drain_nodes` lets every node have workers again. A key is made where none is given, so
        that a retry cannot scale twice. Raises APIError."""
        return self._run(self._calls.scale(dry_run, idempotency_key, target))

    def roll(
        self,
        model: str | None = None,
        *,
        manifest: Mapping[str, Any] | None = None,
        dry_run: bool = False,
        idempotency_key: str | None = None,
        **target: Unpack[RollTarget],
    ) -> Operation:
        """Begin to serve other weights of the same architecture, or other values of workers, or both (POST
        /admin/operations). `model` is the directory of the weights, as the cluster sees it; without one they stay the
        same. `manifest` is a whole one, as its file says: what it has for workers they get, and the operation's plan
        says what of it stays as it is. Streams finish on the workers that they began on. Fewer groups or shards than
        there are take less room until the old ones are gone; then there are as many again. Raises APIError."""
        return self._run(self._calls.roll(model, manifest, dry_run, idempotency_key, target))

    def operation(self, operation_id: str) -> Operation:
        """What has become of an operation."""
        return self._run(self._calls.operation(operation_id))

    def operations(self) -> list[Operation]:
        """Those that the cluster remembers, oldest first; its own, as the autoscaler's, among them."""
        return self._run(self._calls.operations())

    def wait_for_operation(
        self, operation_id: str, timeout: float = 600.0, at_each_look: Callable[[Operation], None] | None = None
    ) -> Operation:
        """The operation when it has ended; until then `at_each_look` is given it, ten times a second. Raises
        TimeoutError after `timeout` seconds."""
        return self._run(self._calls.wait_for_operation(operation_id, timeout, at_each_look))

    def events(self) -> Iterator[OperationEvent]:
        """Each phase that an operation comes to from now on, for ever."""
        events = OperationEvents()
        for state in self.feed():
            if not state.trouble:
                yield from events.new(state.operations())

    def feed(self) -> Iterator[ClusterState]:
        """The cluster as it is, again after each change, for ever: one state that changes. Where the connection breaks
        it is made again, and meanwhile the state says its `trouble`. Raises APIError, and ConnectionFailedError where
        nothing answers at first."""
        reader = FeedReader(self.base_url)
        while True:
            trouble: Exception | None = None
            try:
                with self._http.stream("GET", FEED, headers=reader.headers) as response:
                    if response.status_code != 200:
                        response.read()
                    reader.begin(response)
                    for data in response.iter_bytes():
                        yield from reader.feed(data)
            except (httpx.TransportError, StreamBrokenError) as error:
                trouble = error
            pause = reader.broken(trouble)
            yield reader.state
            time.sleep(pause)

    def experts(self) -> JSON:
        """Rows, holders and group heat of every expert (GET /admin/experts)."""
        return self._run(self._calls.get("/admin/experts"))

    def autoscaler(self) -> JSON:
        """What the autoscaler sees and has decided (GET /admin/autoscaler)."""
        return self._run(self._calls.get("/admin/autoscaler"))

    def set_autoscaler(self, mode: AutoscalerMode) -> JSON:
        """Change what the autoscaler may do (POST /admin/autoscaler), until it is changed again."""
        return self._run(self._calls.post("/admin/autoscaler", {"mode": mode}))

    def request(self, method: str, path: str, body: Any = None, *, retry: bool = True) -> RawResponse:
        """Any request of the API, with retries. Raises ConnectionFailedError; an error status is not an exception."""
        return self._run(self._calls.request(method, path, body, retry))

    # --- how --------------------------------------------------------------------------------------

    def _run(self, call: Call[_T]) -> _T:
        try:
            step = next(call)
            while True:
                try:
                    outcome = self._act(step)
                except httpx.TransportError as error:
                    step = call.throw(error)
                else:
                    step = call.send(outcome)
        except StopIteration as end:
            result: _T = end.value
            return result

    def _act(self, step: Send | Pause) -> httpx.Response | None:
        if isinstance(step, Send):
            return self._http.request(step.method, step.path, json=step.body)
        time.sleep(step.seconds)
        return None

    def _run_async(self, work: Callable[[AsyncClient], Coroutine[Any, Any, _T]]) -> _T:
        """With the same client for asyncio: many requests at once, which an interruption ends."""

        async def run() -> _T:
            async with AsyncClient(self.base_url, transport=self._async_transport(), **self._options) as client:
                return await work(client)

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(run())
        with ThreadPoolExecutor(1) as thread:  # a notebook has a loop here, which must not run another
            return thread.submit(asyncio.run, run()).result()

    def _async_transport(self) -> httpx.AsyncBaseTransport | None:
        if self._server is not None:
            return httpx.AsyncHTTPTransport(uds=self._server.socket, limits=LIMITS)
        if self._transport is None or isinstance(self._transport, httpx.AsyncBaseTransport):
            return self._transport
        raise ValueError(f"transport: batches need one for asyncio, which {type(self._transport).__name__} is not")

    def _streamed(self, request: Call[Send]) -> Stream:
        reply = self._calls.streamed()
        return Stream(self._pieces(self._calls.stream_request(request), reply), reply)

    def _pieces(self, call: Call[Send], reply: StreamedReply) -> Iterator[Chunk]:
        request = self._run(call)
        while True:
            try:
                with self._http.stream(request.method, request.path, json=request.body) as response:
                    if (pause := reply.after_response(response)) is None:
                        if response.status_code != 200:
                            response.read()
                            reply.refused(response)
                        for data in response.iter_bytes():
                            yield from reply.feed(data)
                        reply.end()
                        return
            except httpx.TransportError as error:
                pause = reply.after_error(error)
            time.sleep(pause)
