"""What a route's reply is, whatever its words, and how JSON and server-sent events are written."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import Response

from isotherm.cluster.api.choices import ChoiceDelta, ChoiceStream
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.jsontypes import JSON


@dataclass(frozen=True)
class Usage:
    """Tokens of one reply, all choices together. Of the prompt's, `cached_tokens` were in the prefix cache; of the
    completion's, `reasoning_tokens` are the thought's, and drafts that were guessed right or wrong are
    `accepted_tokens` and `rejected_tokens`. `timings`: where the time went, where it was asked for."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    accepted_tokens: int = 0
    rejected_tokens: int = 0
    timings: JSON | None = None


def usage(prompt_tokens: int, choices: Sequence[ChoiceStream], n: int) -> Usage:
    """A prompt's cached tokens are those of the first of its `n` choices, since the prompt is counted once."""
    return Usage(
        prompt_tokens,
        sum(choice.completion_tokens for choice in choices),
        sum(choice.cached_tokens for choice in choices[::n]),
        sum(choice.reasoning_tokens for choice in choices),
        sum(choice.drafts_accepted for choice in choices),
        sum(choice.drafts_rejected for choice in choices),
    )


class Reply(Protocol):
    """One reply in the words of its route, whole or as a stream of server-sent events."""

    @property
    def waiting(self) -> bytes:
        """What is sent while there is nothing to send."""

    def whole(self, choices: Sequence[ChoiceDelta], used: Usage) -> JSON:
        """The reply in one piece; each choice's deltas are merged into one."""

    def events(self, delta: ChoiceDelta) -> bytes:
        """The events for one delta. What a stream begins with comes before the first."""

    def end(self, used: Usage) -> bytes:
        """The events that a stream ends with, after all choices have finished."""

    def error(self, error: ReplyError) -> bytes:
        """The event that a stream ends with which cannot go on."""


_ENTRIES = 128  # of a list that the encoder takes at once: choices may be as many, and each may be long
COMMENT = b": waiting\n\n"  # a server-sent event stream may have such a line anywhere, and it means nothing


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")


async def long_json_response(value: Any, headers: dict[str, str]) -> Response:
    return Response(await asyncio.to_thread(to_json_by_parts, value), 200, headers, "application/json")


def sse(value: JSON, event: str = "", by_parts: bool = False) -> bytes:
    """One server-sent event, of a type where `event` names one."""
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + (to_json_by_parts(value) if by_parts else to_json(value)) + b"\n\n"


def to_json_by_parts(value: Any) -> bytes:
    """As `to_json`, for what is long and made in a thread: a call of the encoder keeps all other threads waiting, so
    long lists have one for every few entries."""
    if isinstance(value, dict):
        return b"{" + b",".join(to_json(key) + b":" + to_json_by_parts(entry) for key, entry in value.items()) + b"}"
    if isinstance(value, list) and len(value) > _ENTRIES:
        slices = (value[i : i + _ENTRIES] for i in range(0, len(value), _ENTRIES))
        return b"[" + b",".join(to_json(part)[1:-1] for part in slices) + b"]"
    if isinstance(value, list):
        return b"[" + b",".join(map(to_json_by_parts, value)) + b"]"
    return to_json(value)


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON. The three line separators outside ASCII are escaped, since some clients split events with
    str.splitlines."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char, escaped in (("\u2028", "\\u2028"), ("\u2029", "\\u2029"), ("\x85", "\\u0085")):
        if char in text:
            text = text.replace(char, escaped)
    return text.encode()
