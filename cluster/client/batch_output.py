"""What a batch gives: a result for each row, in OpenAI's form; in a file that a further run completes, or in memory."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from isotherm.cluster.client.answers import Completion, RawResponse, completion, said_in
from isotherm.cluster.client.batch_rows import Row, result_key
from isotherm.cluster.client.errors import BatchError, api_error
from isotherm.cluster.jsontypes import JSON

# Line ends outside of ASCII, which JSON does not escape: of those who read lines some split them there.
_SEPARATORS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
_SYNC_INTERVAL_S = 5.0  # results a power cut may cost; a killed process costs none


@dataclass(frozen=True)
class BatchResult:
    """What came of a row. `body` is the server's answer, also one of an error; None where there is none. `error` says
    why the row failed, and is empty where it did not."""

    custom_id: str
    status: int | None
    body: Any
    error: str

    @property
    def completion(self) -> Completion:
        """The answer to a chat or a completion. Raises APIError where the row failed."""
        if self.error:
            raise api_error(self.status or 400, self.error)
        return completion(self.body)

    @property
    def text(self) -> str:
        """Of the first choice. Raises APIError where the row failed."""
        return self.completion.text


class Sink(Protocol):
    """Where results go. `done` has the keys of the rows that were there before, and which of them failed."""

    @property
    def done(self) -> Mapping[bytes, bool]: ...

    def write(self, result: JSON) -> None: ...


class MemorySink:
    """Results by the rows' keys."""

    def __init__(self) -> None:
        self.done: dict[bytes, bool] = {}
        self.results: dict[bytes, BatchResult] = {}

    def write(self, result: JSON) -> None:
        self.results[key_of(result)] = read_result(result)


def result_line(row: Row, response: RawResponse | None, error: Mapping[str, str] | None) -> JSON:
    answer = (
        None
        if response is None
        else {"status_code": response.status, "request_id": response.request_id, "body": response.body}
    )
    again = {"occurrence": row.occurrence} if row.occurrence > 1 else {}
    name = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": row.custom_id}
    return {**name, **again, "response": answer, "error": error}


def key_of(result: JSON) -> bytes:
    """Raises KeyError, TypeError or AttributeError where it is none."""
    custom_id: str = result["custom_id"]
    custom_id.encode("utf-8", "surrogatepass")
    return result_key(custom_id, int(result.get("occurrence", 1)))


def read_result(result: JSON) -> BatchResult:
    response = result["response"] or {}
    error = result["error"] or {}
    status, body = response.get("status_code"), response.get("body")
    why = error.get("message", "") or ("" if not failed(result) else said_in(body) or f"HTTP {status}")
    return BatchResult(result["custom_id"], status, body, why)


def read_results(path: Path) -> Iterator[BatchResult]:
    """The results of an output file, in the order in which they came. Raises BatchError, OSError."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield read_result(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BatchError(f"{path}: line {number} is not a batch result") from None


def failed(result: JSON) -> bool:
    """Whether a result is one of an error. A response (of /v1/responses) may say so with status 200."""
    response = result["response"]
    if result["error"] is not None or response["status_code"] != 200:
        return True
    return isinstance(response["body"], dict) and response["body"].get("status") == "failed"


class OutputFile:
    """The output file, open for appending and locked against a second run. A result is written with one append, so a
    kill leaves at most a torn last line, which is cut off when the file is opened again."""

    def __init__(self, path: Path) -> None:
        import fcntl  # which Windows has not: there a client can do everything else

        self._path = path
        if path.suffix == ".gz":
            raise BatchError(f"{path}: results are written as plain JSON Lines; give a name without .gz")
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

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def write(self, result: JSON) -> None:
        """Appends one line. Raises OSError, with a torn line left for the next run to cut off."""
        text = json.dumps(result, ensure_ascii=False).translate(_SEPARATORS)
        left = memoryview(text.encode("utf-8", "backslashreplace") + b"\n")
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
                    done[key_of(result)] = failed(result)
                except (ValueError, KeyError, TypeError, AttributeError):
                    if file.peek(1):
                        raise BatchError(
                            f"{self._path}: line {number} is not a batch result; give another output file"
                        ) from None
                    break
                end += len(line)
        os.ftruncate(self._file, end)
        return done
