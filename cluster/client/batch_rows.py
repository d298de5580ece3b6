"""What the records of a batch mean: which request each is, and by which name its result is known. Pure.

A row is OpenAI's ({"custom_id", "method", "url", "body"}) or the body alone ({"prompt": …}, {"messages": …} or
{"input": …}), which says by its field where it goes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isotherm.cluster.client.batch_input import Kind, Record
from isotherm.cluster.client.errors import BatchError
from isotherm.cluster.jsontypes import JSON

URLS = {
    "messages": "/v1/chat/completions",
    "prompt": "/v1/completions",
    "input": "/v1/responses",
}  # by the body's field


@dataclass(frozen=True)
class Row:
    """A request, or the `problem` of a row that is none. `occurrence`: it is the second, third … that has its
    custom_id, with another content."""

    custom_id: str
    occurrence: int
    url: str
    body: JSON
    problem: str = ""

    @property
    def key(self) -> bytes:
        return result_key(self.custom_id, self.occurrence)


class Rows:
    """Makes rows of records, in their order, and counts what is odd about them."""

    def __init__(self) -> None:
        self.torn: list[str] = []  # ends of files that are not all there
        self.unreadable = 0  # lines that are no JSON
        self.readable = 0
        self.without_model = False  # a row that can be asked names no model
        self.first_problem = ""
        self._odd: Counter[str] = Counter()
        self._contents: dict[bytes, list[bytes]] = {}  # what came under a custom_id; digests, for files may be long

    def take(self, record: Record) -> Row | None:
        """None where there is nothing to ask: a blank line, a torn one, or a row that was there before."""
        if record.kind is Kind.BLANK:
            self._odd["blank"] += 1
            return None
        if record.kind is Kind.TORN:
            self.torn.append(f"{record.place} is half written ({record.problem})")
            return None
        if record.kind is Kind.UNREADABLE:
            self.unreadable += 1
            self.first_problem = self.first_problem or f"{record.place}: {record.problem}"
            return self._new(record.place, "", {}, record.problem)
        self.readable += 1
        custom_id, url, body, problem = self._read(record)
        row = self._new(custom_id, url, body, problem)
        self.without_model |= row is not None and not problem and not body.get("model")
        return row

    def notes(self) -> list[str]:
        """What a user may want to know, a line each."""
        return [words.format(self._odd[name]) for name, words in _NOTES.items() if self._odd[name]]

    def check(self) -> None:
        """Raises BatchError where nothing that was taken is a row: it is another kind of file."""
        if self.unreadable and not self.readable:
            raise BatchError(f"{self.first_problem}; expected JSON Lines, an object on each line, or Parquet")

    def _read(self, record: Record) -> tuple[str, str, JSON, str]:
        value = record.value
        if not isinstance(value, Mapping):
            return record.place, "", {}, f"expected a JSON object, got {type(value).__name__}"
        fields = dict(value)
        given, problem = fields.pop("custom_id", None), ""
        if isinstance(given, int) and not isinstance(given, bool):
            self._odd["number"] += 1
            given = str(given)
        elif given is not None and not isinstance(given, str):
            problem = f"custom_id: expected a string, got {type(given).__name__}"
        if not given or problem:
            self._odd["unnamed"] += 1
            given = record.place
        url, body, wrong = _request(fields)
        return given, url, body, problem or wrong

    def _new(self, custom_id: str, url: str, body: JSON, problem: str) -> Row | None:
        content = _digest(json.dumps([url, body, problem], sort_keys=True, default=str))
        before = self._contents.setdefault(_digest(custom_id), [])
        if content in before:
            self._odd["repeated"] += 1
            return None
        self._odd["ambiguous"] += bool(before)
        before.append(content)
        return Row(custom_id, len(before), url, body, problem)


_NOTES = {
    "unnamed": "{} without a custom_id: named by where they stand, as in.jsonl:7",
    "number": "{} with a number for a custom_id: taken as text",
    "repeated": "{} repeated word for word: asked once",
    "ambiguous": "{} with the custom_id of another row: asked too; `occurrence` in their results tells them apart",
    "blank": "{} blank lines",
}


def result_key(custom_id: str, occurrence: int) -> bytes:
    """By which a row is found again in the output: 16 bytes instead of the name, for each is kept in memory."""
    return _digest(f"{occurrence} {custom_id}")


def _request(fields: JSON) -> tuple[str, JSON, str]:
    """(url, body, problem) of a row's fields without its custom_id."""
    method = fields.pop("method", "POST")
    if method != "POST":
        return "", {}, f"method: expected 'POST', got {method!r}"
    plain = "body" not in fields and "url" not in fields
    body = fields if plain else fields.get("body")
    if isinstance(body, str):  # as tables have it
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            return "", {}, f"body: not JSON: {error}"
    if not isinstance(body, Mapping):
        return "", {}, f"body: expected an object, got {type(body).__name__}"
    url, problem = _url(fields, body, plain)
    return url, dict(body), problem or _problem(body)


def _url(fields: JSON, body: Mapping[str, Any], plain: bool) -> tuple[str, str]:
    url = None if plain else fields.get("url")
    if url is None:
        meant = [name for name in URLS if name in body]
        if len(meant) == 1:
            return URLS[meant[0]], ""
        expected = "one of " + ", ".join(URLS) + (" (or custom_id, url and body)" if plain else "")
        return "", f"{'row' if plain else 'url'}: expected {expected}, got {' and '.join(meant) or 'none of them'}"
    if url not in URLS.values():
        return "", f"url: expected {', '.join(URLS.values())}, got {url!r}"
    return url, ""


def _problem(body: Mapping[str, Any]) -> str:
    """What keeps a body from being asked."""
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        return f"body: can't be sent as JSON: {error}"
    for name in ("stream", "background"):
        if body.get(name):
            return f"body.{name}: the answer to a row of a batch comes whole; leave it out"
    return ""


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
