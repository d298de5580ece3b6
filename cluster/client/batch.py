"""Runs a file of requests against a server: rows in, one result line per row, resumed from its own output.

The output is the only state. A row is in the output once: when the server has answered it, be it with an error that is
about the row. A row that the server could not be asked stays out, for the next run; so does one that was answered by
something else than the API (a wrong path, a proxy's page), which ends the run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from isotherm.cluster.client.answers import RawResponse, said_in
from isotherm.cluster.client.batch_input import MemorySource, Source, opened
from isotherm.cluster.client.batch_output import BatchResult, MemorySink, OutputFile, Sink, failed, result_line
from isotherm.cluster.client.batch_rows import Row, Rows
from isotherm.cluster.client.errors import BatchError, ClientError, ConnectionFailedError
from isotherm.cluster.jsontypes import JSON

LOW_PRIORITY = 100  # of rows that name none: whatever else is asked (0, where it does not say) has its turn first
CONCURRENCY = 32
_TRANSIENT_STATUS = (429, 502, 503, 504)
_FOR_ALL_ROWS = (401, 403, 404, 405, 407)  # a row is not to blame, whatever it asks
# Exit statuses of `isotherm batch`; 1 is an error that kept it from running, 2 a wrong command line.
ROWS_FAILED, ROWS_LEFT = 3, 4


class Asker(Protocol):
    """What a batch needs of a client."""

    @property
    def base_url(self) -> str: ...

    async def models(self) -> list[str]: ...

    async def request(self, method: str, path: str, body: Any = None) -> RawResponse: ...


@dataclass
class BatchSummary:
    """Rows: all of the input; of those the ones found done; answered in this run; answered with an error, in this run
    or before; and not answered, which a further run will ask again. `notes` says what was odd about the input."""

    total: int = 0
    resumed: int = 0
    completed: int = 0
    failed: int = 0
    unfinished: int = 0
    reason: str = ""  # why rows are unfinished
    notes: Sequence[str] = ()

    @property
    def exit_status(self) -> int:
        """0: every row has an answer and none is an error; ROWS_LEFT, else ROWS_FAILED."""
        return ROWS_LEFT if self.unfinished else ROWS_FAILED if self.failed else 0


ProgressCallback = Callable[[BatchSummary], None]


@dataclass(frozen=True)
class BatchOptions:
    """At most `concurrency` rows are asked at a time. `priority` is that of rows that name none; 0 is not sent, for
    servers that know no priorities.

    A row that can't be asked (no connection, 429, 503; the client's own retries included) is tried `attempts` times
    with growing waits from `backoff_s` seconds, counted anew whenever another row was answered meanwhile; when one is
    given up, no new rows are begun."""

    concurrency: int = CONCURRENCY
    priority: int = LOW_PRIORITY
    attempts: int = 5
    backoff_s: float = 1.0

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise BatchError(f"concurrency must be at least 1, got {self.concurrency}")


async def run_batch(
    inputs: str | Path | Sequence[str | Path],
    output: Path,
    client: Asker,
    options: BatchOptions | None = None,
    progress: ProgressCallback | None = None,
) -> BatchSummary:
    """Asks every row of the input (paths, globs, or `-`) that the output doesn't have. Reads the input twice: once to
    check it, so that a file of another kind shows before any work. Raises BatchError, OSError."""
    options = options or BatchOptions()
    with opened(inputs, output) as source, OutputFile(output) as sink:
        return await _Batch(source, sink, client, options, progress).run()


async def run_rows(rows: Iterable[Any], client: Asker, options: BatchOptions | None = None) -> list[BatchResult]:
    """The results of rows that are in memory (texts, or mappings as files have them), in their order. One that the
    server could not be asked has the reason for its error."""
    source, sink = MemorySource(rows), MemorySink()
    summary = await _Batch(source, sink, client, options or BatchOptions(), None).run()
    names, results = Rows(), []
    for record in source.records():
        if (row := names.take(record)) is None:  # given twice under one custom_id
            continue
        left = BatchResult(row.custom_id, None, None, summary.reason)
        results.append(sink.results.get(row.key, left))
    return results


class _Batch:
    """One run."""

    def __init__(
        self, source: Source, sink: Sink, client: Asker, options: BatchOptions, progress: ProgressCallback | None
    ) -> None:
        self._source, self._sink, self._client, self._options = source, sink, client, options
        self._progress = progress
        self._summary = BatchSummary()
        self._model: str | None = None  # of rows that name none

    async def run(self) -> BatchSummary:
        summary, done = self._summary, self._sink.done
        checked = Rows()
        wanted = {row.key for row in self._rows(checked)}
        checked.check()
        found = [done[key] for key in wanted if key in done]
        summary.total, summary.resumed, summary.failed = len(wanted), len(found), sum(found)
        summary.notes = checked.notes() or ([] if wanted else ["the input has no rows"])
        if self._progress is not None:
            self._progress(summary)
        if summary.total > summary.resumed and (not checked.without_model or await self._find_model()):
            # The file may have grown since it was checked.
            left = (row for row in self._rows(Rows()) if row.key in wanted and row.key not in done)
            await self._ask_all(left, min(self._options.concurrency, len(wanted) - len(found)))
        summary.unfinished = summary.total - summary.resumed - summary.completed
        if checked.torn:
            summary.unfinished += len(checked.torn)
            summary.reason = "; ".join([*([summary.reason] if summary.reason else []), *checked.torn])
        return summary

    def _rows(self, rows: Rows) -> Iterator[Row]:
        return (row for record in self._source.records() if (row := rows.take(record)) is not None)

    async def _find_model(self) -> bool:
        """The first that is served; False, with the reason, where the server can't be asked."""
        problem = "the server lists no model"
        for attempt in range(1, self._options.attempts + 1):
            try:
                if names := await self._client.models():
                    self._model = names[0]
                    return True
            except ClientError as error:
                problem = str(error)
            if attempt < self._options.attempts:
                await self._back_off(attempt)
        self._summary.reason = f"which model is served: {problem}"
        return False

    async def _ask_all(self, rows: Iterator[Row], workers: int) -> None:
        async def work() -> None:
            for row in rows:  # shared by all workers; no await between taking a row and owning it
                if self._summary.reason:
                    return
                result = await self._ask(row)
                if isinstance(result, str):
                    self._summary.reason = self._summary.reason or result
                    return
                self._sink.write(result)
                self._summary.completed += 1
                self._summary.failed += failed(result)
                if self._progress is not None:
                    self._progress(self._summary)

        tasks = [asyncio.ensure_future(work()) for _ in range(workers)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, row: Row) -> JSON | str:
        """The row's result, or why it could not be asked. As long as others are answered, the server is only busy."""
        if row.problem:
            return result_line(row, None, {"code": "invalid_row", "message": row.problem})
        body = self._body(row)
        attempt, before = 0, self._summary.completed
        while True:
            try:
                response = await self._client.request("POST", row.url, body)
            except ConnectionFailedError as error:
                reason = str(error)
            else:
                if response.status not in _TRANSIENT_STATUS:
                    if (no_answer := _no_answer(response)) is not None:
                        return f"{row.custom_id}: {self._client.base_url}{row.url} {no_answer}"
                    return result_line(row, response, None)
                reason = f"the server answered {response.status}"
            answered = self._summary.completed
            attempt, before = (attempt + 1 if answered == before else 1), answered
            if attempt >= self._options.attempts:
                return f"{row.custom_id}: {reason}, {self._options.attempts} times"
            await self._back_off(attempt)

    def _body(self, row: Row) -> JSON:
        model = {} if row.body.get("model") else {"model": self._model}
        priority = {"priority": self._options.priority} if self._options.priority else {}
        return {**priority, **row.body, **model}

    async def _back_off(self, attempt: int) -> None:
        await asyncio.sleep(min(self._options.backoff_s * 2 ** min(attempt - 1, 20), 30.0))


def _no_answer(response: RawResponse) -> str | None:
    """Why what came is no answer to the row: nothing of the API answers there, or it answers nobody. None where it is
    one."""
    body = response.body if isinstance(response.body, dict) else {}
    if response.status == 200:
        if isinstance(body.get("choices"), list) or isinstance(body.get("output"), list):
            return None
        return "answered 200 with something else than a reply; is it the API's address?"
    error = body.get("error")
    if not isinstance(error, dict) or response.status < 400:
        said = said_in(body) or "no error object"
        return f"answered {response.status}, and not as the API does: {said}; is it the API's address?"
    # What a field of the row names, such as its model or an earlier response, may be unknown to a server that answers.
    its_own = response.status == 404 and (error.get("code") == "model_not_found" or bool(error.get("param")))
    if response.status in _FOR_ALL_ROWS and not its_own:
        return f"answered {response.status}: {said_in(body)}"
    return None
