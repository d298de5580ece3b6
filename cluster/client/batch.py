"""Runs a file of requests in OpenAI's batch format against a server: rows in, one result line per row, resumed from its
own output.

The output is the only state. A result line is written with one append, so a kill leaves at most a torn last line, which
the next run cuts off. A row is in the output once: when the server has answered it, be it with an error that is about
the row. A row that the server could not be asked stays out, for the next run; so does one that was answered by
something else than the API (a wrong path, a proxy's page), which ends the run."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from isotherm.cluster.client.answers import ConnectionFailedError, RawResponse, said_in
from isotherm.cluster.client.async_client import AsyncClient
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON

_URLS = ("/v1/chat/completions", "/v1/completions")
_TRANSIENT_STATUS = (429, 502, 503, 504)
_FOR_ALL_ROWS = (401, 403, 404, 405, 407)  # a row is not to blame, whatever it asks; but for a model that is not served
# Exit statuses of `isotherm batch`; 1 is an error that kept it from running, 2 a wrong command line.
ROWS_FAILED, ROWS_LEFT = 3, 4
_SYNC_INTERVAL_S = 5.0  # results a power cut may cost; a killed process costs none
_PLAIN_INTERVAL_S = 5.0


class BatchError(IsothermError):
    """The batch can't run. Names the file, and the line where there is one."""


@dataclass
class BatchSummary:
    """Rows: all of the input; of those the ones found done; answered in this run; answered with an error, in this run
    or before; and not answered, which a further run will ask again."""

    total: int = 0
    resumed: int = 0
    completed: int = 0
    failed: int = 0
    unfinished: int = 0
    reason: str = ""  # why rows are unfinished

    @property
    def exit_status(self) -> int:
        """0: every row has an answer and none is an error; ROWS_LEFT, else ROWS_FAILED."""
        return ROWS_LEFT if self.unfinished else ROWS_FAILED if self.failed else 0


ProgressCallback = Callable[[BatchSummary], None]


def run(input_path: Path, output_path: Path, base_url: str, concurrency: int = 32) -> BatchSummary:
    """Runs a batch with progress on standard error: a bar on a terminal, else a line every few seconds. Raises
    BatchError, OSError."""

    async def go(progress: ProgressCallback) -> BatchSummary:
        async with AsyncClient(base_url) as client:
            return await run_batch(input_path, output_path, client, concurrency, progress)

    if not sys.stderr.isatty():
        return asyncio.run(go(_plain_progress()))
    columns = (
        TextColumn("batch"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("batch", total=None, failed=0)

        def show(summary: BatchSummary) -> None:
            bar.update(task, total=summary.total, completed=summary.resumed + summary.completed, failed=summary.failed)

        return asyncio.run(go(show))


async def run_batch(
    input_path: Path,
    output_path: Path,
    client: AsyncClient,
    concurrency: int = 32,
    progress: ProgressCallback | None = None,
    *,
    attempts: int = 5,
    backoff_s: float = 1.0,
) -> BatchSummary:
    """Asks every row of the input that the output doesn't have, at most `concurrency` at a time.

    A row that can't be asked (no connection, 429, 503; the client's own retries included) is tried `attempts` times
    with growing waits from `backoff_s` seconds, counted anew whenever another row was answered meanwhile; when one is
    given up, no new rows are begun. Reads the input twice: once to check it, so that a mistake in its last line shows
    before any work; what cannot be read twice (a pipe, or `-`: standard input) is put into a temporary file. Raises
    BatchError, OSError."""
    if concurrency < 1:
        raise BatchError(f"concurrency must be at least 1, got {concurrency}")
    with _opened(input_path) as source, _Output(output_path) as output:
        wanted = _check_input(source, input_path)
        done = output.done.keys() & wanted
        summary = BatchSummary(total=len(wanted), resumed=len(done), failed=sum(output.done[digest] for digest in done))
        rows = (row for _, row in _rows(source, input_path) if _digest(row["custom_id"]) not in done)
        if progress is not None:
            progress(summary)

        async def work() -> None:
            for row in rows:  # shared by all workers; no await between taking a row and owning it
                if summary.reason:
                    return
                response = await _ask(client, row, attempts, backoff_s, lambda: summary.completed)
                if isinstance(response, str):
                    summary.reason = summary.reason or response
                    return
                output.write(response)
                summary.completed += 1
                summary.failed += _failed(response)
                if progress is not None:
                    progress(summary)

        workers = [asyncio.ensure_future(work()) for _ in range(min(concurrency, len(wanted) - len(done)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        summary.unfinished = summary.total - summary.resumed - summary.completed
    return summary


async def _ask(
    client: AsyncClient, row: JSON, attempts: int, backoff_s: float, answered: Callable[[], int]
) -> JSON | str:
    """The row's result line, or why it could not be asked. `answered`: how many rows have been; as long as that grows,
    the server is only busy."""
    if (problem := _problem(row)) is not None:
        return _result(row, None, {"code": "invalid_row", "message": problem})
    attempt, before = 0, answered()
    while True:
        try:
            response = await client.request("POST", row["url"], row["body"])
        except ConnectionFailedError as error:
            reason = str(error)
        else:
            if response.status not in _TRANSIENT_STATUS:
                if (no_answer := _no_answer(response)) is not None:
                    return f"{row['custom_id']}: {client.base_url}{row['url']} {no_answer}"
                return _result(row, response, None)
            reason = f"the server answered {response.status}"
        attempt, before = (attempt + 1 if answered() == before else 1), answered()
        if attempt >= attempts:
            return f"{row['custom_id']}: {reason}, {attempts} times"
        await asyncio.sleep(min(backoff_s * 2 ** (attempt - 1), 30.0))


def _no_answer(response: RawResponse) -> str | None:
    """Why what came is no answer to the row: nothing of the API answers there, or it answers nobody. None where it is
    one."""
    body = response.body if isinstance(response.body, dict) else {}
    if response.status == 200:
        if isinstance(body.get("choices"), list):
            return None
        return "answered 200 with something else than a reply; is it the API's address?"
    error = body.get("error")
    if not isinstance(error, dict) or response.status < 400:
        said = said_in(body) or "no error object"
        return f"answered {response.status}, and not as the API does: {said}; is it the API's address?"
    unknown_model = response.status == 404 and (error.get("code") == "model_not_found" or error.get("param") == "model")
    if response.status in _FOR_ALL_ROWS and not unknown_model:
        return f"answered {response.status}: {said_in(body)}"
    return None


def _failed(result: JSON) -> bool:
    """Whether a result line is one of an error."""
    return result["error"] is not None or result["response"]["status_code"] != 200


def _problem(row: JSON) -> str | None:
    """What is wrong with a row that has a custom_id: its own error, not the whole batch's."""
    if row.get("method") != "POST":
        return f"method: expected 'POST', got {row.get('method')!r}"
    if row.get("url") not in _URLS:
        return f"url: expected {' or '.join(_URLS)}, got {row.get('url')!r}"
    if not isinstance(row.get("body"), dict):
        return f"body: expected an object, got {type(row.get('body')).__name__}"
    try:
        json.dumps(row["body"], ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        return f"body: can't be sent as JSON: {error}"
    return "body.stream: a batch row can't stream" if row["body"].get("stream") else None


def _result(row: JSON, response: RawResponse | None, error: dict[str, str] | None) -> JSON:
    answer = (
        None
        if response is None
        else {"status_code": response.status, "request_id": response.request_id, "body": response.body}
    )
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": row["custom_id"], "response": answer, "error": error}


class _Output:
    """The output file, open for appending and locked against a second run. `done` has the digests of the custom_ids in
    it, and which are of errors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BatchError(f"{path}: another batch is writing this file") from None
            self.done = self._recover()
        except BaseException:
            os.close(self._file)
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def write(self, result: JSON) -> None:
        """Appends one line. Raises OSError, with a torn line left for the next run to cut off."""
        left = memoryview(json.dumps(result, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        while left:
            left = left[os.write(self._file, left) :]
        if time.monotonic() - self._synced > _SYNC_INTERVAL_S:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def _recover(self) -> dict[bytes, bool]:
        done: dict[bytes, bool] = {}
        end = 0  # bytes of whole lines
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if not line.endswith(b"\n"):
                        break
                    result = json.loads(line)
                    done[_digest(result["custom_id"])] = _failed(result)
                except (ValueError, KeyError, TypeError, AttributeError):
                    if file.peek(1):
                        raise BatchError(
                            f"{self._path}: line {number} is not a batch result; give another output file"
                        ) from None
                    break
                end += len(line)
        os.ftruncate(self._file, end)
        return done


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The input, to be read more than once."""
    with ExitStack() as stack:
        file: IO[bytes] = sys.stdin.buffer if str(path) == "-" else stack.enter_context(open(path, "rb"))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            copy = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, copy)
            file = copy
        yield file


def _check_input(file: IO[bytes], path: Path) -> set[bytes]:
    """The digests of all custom_ids. Raises BatchError on a line that has none or repeats one."""
    seen: set[bytes] = set()
    for number, row in _rows(file, path):
        digest = _digest(row["custom_id"])
        if digest in seen:
            raise BatchError(f"{path}: line {number}: custom_id {row['custom_id']!r} appears twice")
        seen.add(digest)
    return seen


def _rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, JSON]]:
    """(line number, row), read as they are asked for, from the beginning. Blank lines are skipped."""
    file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["custom_id"].encode()
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise BatchError(f"{path}: line {number}: expected a JSON object with a custom_id string") from None
        yield number, row


def _digest(custom_id: str) -> bytes:
    # 16 bytes each instead of the ids: what is kept in memory for a row
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


def _plain_progress() -> ProgressCallback:
    shown = -_PLAIN_INTERVAL_S

    def show(summary: BatchSummary) -> None:
        nonlocal shown
        done = summary.resumed + summary.completed
        if time.monotonic() - shown < _PLAIN_INTERVAL_S and done < summary.total:
            return
        shown = time.monotonic()
        with suppress(OSError):  # a reader of the progress that went away ends no batch
            print(f"batch: {done} of {summary.total} rows done, {summary.failed} failed", file=sys.stderr, flush=True)

    return show
