"""A streamed reply: server-sent events from bytes, chunks from events, and the whole reply from chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from isotherm.cluster.client.answers import (
    Choice,
    Chunk,
    Completion,
    TokenLogprob,
    ToolCall,
    ToolCallPiece,
    Usage,
    chunks,
    said_in,
)
from isotherm.cluster.client.errors import StreamBrokenError
from isotherm.cluster.jsontypes import JSON


class Events:
    """Server-sent events from bytes, as they come in. Splits at line feeds only: text may hold other separators."""

    def __init__(self) -> None:
        self.received = False
        self.whole = Gathered()  # what has come so far
        self._done = False
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Chunk]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self._done = True
                continue
            event = _event(payload)
            self.received = True
            self.whole.name(event)
            try:
                for chunk in chunks(event):
                    self.whole.add(chunk)
                    yield chunk
            except (TypeError, AttributeError, KeyError, ValueError) as error:
                raise StreamBrokenError(f"an event is not in OpenAI's form: {payload[:80]!r}") from error

    def end(self) -> None:
        """Raises StreamBrokenError unless the stream was complete."""
        if not self._done:
            raise StreamBrokenError("the stream ended without [DONE]")


def _event(payload: bytes) -> JSON:
    """Raises StreamBrokenError where it says that there was an error, or is no object."""
    try:
        event = json.loads(payload)
    except ValueError as error:
        raise StreamBrokenError(f"an event is not JSON: {payload[:80]!r}") from error
    if not isinstance(event, dict):
        raise StreamBrokenError(f"an event is no object: {payload[:80]!r}")
    if event.get("error"):
        raise StreamBrokenError(said_in(event) or "the server reported an error")
    return event


@dataclass
class _Parts:
    """What has come of one choice. Calls by their index: (id, name, parts of the arguments)."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    calls: dict[int, list[ToolCallPiece]] = field(default_factory=dict)
    finish_reason: str | None = None


class Gathered:
    """Chunks put together again to the reply that would have come in one piece."""

    def __init__(self) -> None:
        self._head: dict[str, str] = {}
        self._choices: dict[int, _Parts] = {}
        self._usage: Usage | None = None

    def name(self, event: JSON) -> None:
        for key in ("id", "model", "system_fingerprint"):
            if isinstance(value := event.get(key), str):
                self._head[key] = value

    def add(self, chunk: Chunk) -> None:
        if chunk.usage is not None:
            self._usage = chunk.usage
            return
        parts = self._choices.setdefault(chunk.index, _Parts())
        parts.text.append(chunk.text)
        parts.reasoning.append(chunk.reasoning)
        parts.logprobs += chunk.logprobs
        for piece in chunk.tool_calls:
            parts.calls.setdefault(piece.index, []).append(piece)
        parts.finish_reason = chunk.finish_reason or parts.finish_reason

    def completion(self) -> Completion:
        """What has come so far; one empty choice where nothing has."""
        choices = self._choices or {0: _Parts()}
        return Completion(
            self._head.get("id", ""),
            self._head.get("model", ""),
            tuple(_choice(index, choices[index]) for index in sorted(choices)),
            self._usage,
            self._head.get("system_fingerprint"),
        )


def _choice(index: int, parts: _Parts) -> Choice:
    calls = [parts.calls[i] for i in sorted(parts.calls)]
    return Choice(
        index,
        "".join(parts.text),
        parts.finish_reason,
        "".join(parts.reasoning),
        tuple(
            ToolCall(
                next((piece.id for piece in pieces if piece.id), ""),
                next((piece.name for piece in pieces if piece.name), ""),
                "".join(piece.arguments for piece in pieces),
            )
            for pieces in calls
        ),
        tuple(parts.logprobs),
    )
