"""The lines of a batch's input, checked before any of them is asked, and the lines of its output. Pure."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any

from isotherm.cluster.api.parse import shown
from isotherm.cluster.jsontypes import JSON

MAX_ROWS = 50_000  # OpenAI's limit
_MAX_FAULTS = 100  # of an input file that are shown
_LONGEST_ID = 512
_RESPONSES = "/v1/responses"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One request of a batch."""

    custom_id: str
    body: JSON


@dataclass(frozen=True)
class Fault:
    """What is wrong with a line of the input, or with all of it, in the form of OpenAI's batch errors."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None

    def as_json(self) -> JSON:
        return {"code": self.code, "message": self.message, "param": self.param, "line": self.line}


def error_list(faults: Sequence[Fault]) -> JSON:
    """What a batch has as its `errors`."""
    return {"object": "list", "data": [fault.as_json() for fault in faults]}


def lines(file: IO[bytes], longest: int) -> Iterator[tuple[int, bytes]]:
    """(line number, line), without a byte order mark, line ends and blank lines. Of a line longer than `longest` bytes
    come the first `longest` + 1."""
    file.seek(0)
    number, begins = 0, True
    while part := file.readline(longest + 1):
        if begins:
            number += 1
            if line := (part.removeprefix(_BOM) if number == 1 else part).strip():
                yield number, line
        begins = part.endswith(b"\n")


def parse_row(line: bytes, url: str, longest: int) -> Row | Fault:
    """The request in one line, or what is wrong with it."""
    if len(line) > longest:
        return Fault("line_too_long", f"this line is longer than {longest} bytes")
    try:
        row = json.loads(line)
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return Fault("invalid_json_line", f"this line is not valid JSON: {str(error)[:200]}")
    if not isinstance(row, dict):
        return Fault("invalid_json_line", "this line is no JSON object")
    custom_id, body = row.get("custom_id"), row.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _LONGEST_ID:
        expected = f"a text of 1 to {_LONGEST_ID} characters"
        return Fault("invalid_custom_id", f"expected {expected}, got {shown(custom_id)}", "custom_id")
    if row.get("method") != "POST":
        return Fault("invalid_method", f"expected 'POST', got {shown(row.get('method'))}", "method")
    if row.get("url") != url:
        return Fault("invalid_url", f"expected the batch's endpoint {url!r}, got {shown(row.get('url'))}", "url")
    if not isinstance(body, dict):
        return Fault("invalid_body", f"expected an object, got {shown(body)}", "body")
    if body.get("stream"):
        return Fault("invalid_body", "a row of a batch cannot stream", "body.stream")
    if url == _RESPONSES and body.get("store") is None:
        body = {**body, "store": False}  # a batch's would push out what its key has kept
    return Row(custom_id, body)


def check(file: IO[bytes], url: str, longest: int) -> tuple[int, list[Fault]]:
    """How many rows a file has, and the first of its faults."""
    seen: dict[bytes, int] = {}
    faults: list[Fault] = []
    for number, line in lines(file, longest):
        row = parse_row(line, url, longest)
        if isinstance(row, Row) and (first := seen.setdefault(digest(row.custom_id), number)) != number:
            message = f"custom_id {row.custom_id[:100]!r} stands in line {first} already"
            row = Fault("duplicate_custom_id", message, "custom_id")
        if isinstance(row, Fault):
            faults.append(replace(row, line=number))
        if len(faults) >= _MAX_FAULTS:
            break
        if len(seen) > MAX_ROWS:
            faults.append(Fault("too_many_rows", f"a batch may have {MAX_ROWS} rows", line=number))
            break
    if not seen and not faults:
        faults.append(Fault("empty_file", "the input file has no rows"))
    return len(seen), faults


def choices(body: JSON) -> int:
    """How many the server will generate at once for a row's body, which nobody has checked."""
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    samples = [given for name in ("n", "best_of") if type(given := body.get(name)) is int]
    return prompts * max([1, *samples])


def digest(custom_id: str) -> bytes:
    """What is kept in memory of a row: 16 bytes, however long its id is."""
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


def answered(custom_id: str, status: int, request_id: str, body: Any) -> JSON:
    """The output line of a row that was answered, be it with an error."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}


def unanswered(custom_id: str, code: str, message: str) -> JSON:
    """The output line of a row that was not asked, or whose answer did not come in time."""
    error = {"code": code, "message": message}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": None, "error": error}


@dataclass
class Tally:
    """What the rows that have their line come to."""

    done: set[bytes] = field(default_factory=set)  # their digests
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, line: JSON) -> bool:
        """Count an output line. Gives whether its row has succeeded."""
        self.done.add(digest(line["custom_id"]))
        response = line["response"]
        good = response is not None and response["status_code"] == 200
        self.completed += good
        self.failed += not good
        if good and isinstance(response["body"], dict):
            self._add_usage(response["body"].get("usage") or {})
        return good

    def _add_usage(self, usage: JSON) -> None:
        """Completions and chats have other names for it than responses have."""
        asked = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        given = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
        self.input_tokens += usage.get("prompt_tokens") or usage.get("input_tokens") or 0
        self.output_tokens += usage.get("completion_tokens") or usage.get("output_tokens") or 0
        self.cached_tokens += asked.get("cached_tokens", 0)
        self.reasoning_tokens += given.get("reasoning_tokens", 0)

    @property
    def usage(self) -> JSON:
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.input_tokens + self.output_tokens,
        }
