"""From token deltas to OpenAI's replies: text, logprobs, finish reasons, chunks, usage. Pure: deltas in, JSON values
out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, TokenLogprobs
from isotherm.cluster.text.tokenizer import Tokenizer

_LOWEST_LOGPROB = -9999.0  # what OpenAI gives for minus infinity, which JSON can't say


class GenerationError(Exception):
    """The engine gave up on a request: an HTTP error before the first token, an error event after it."""


@dataclass(frozen=True)
class Update:
    """What one delta adds to a choice. `finish_reason` is OpenAI's word, in the last update only."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None

    @property
    def is_empty(self) -> bool:
        return not self.text and self.logprobs is None and self.finish_reason is None


class Choice:
    """One stream of the reply: turns its deltas into updates, and counts tokens."""

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str],
        skip_special_tokens: bool,
        chat: bool,
        echo: str,
    ) -> None:
        self.index = index
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self._request = request
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(stop, skip_special_tokens)
        self._stop_ids = frozenset(request.params.stop_token_ids)
        self._chat = chat
        self._echo = echo
        self._offset = len(echo)

    def feed(self, delta: Delta) -> Update:
        """Takes the next delta. After one that sets `finish_reason` there is no other. Raises GenerationError on the
        engine's error, and on a gap."""
        if delta.finish_reason is FinishReason.ERROR:
            raise GenerationError(delta.error or "the request failed in the engine")
        if delta.finish_reason is FinishReason.ABORT:
            raise GenerationError("the engine aborted the request")
        skip = self.completion_tokens - delta.start
        if skip < 0:
            raise GenerationError(f"tokens {self.completion_tokens} to {delta.start - 1} of the output are missing")
        tokens, logprobs = delta.token_ids[skip:], delta.logprobs[skip:]
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        self.completion_tokens += len(tokens)
        finish = delta.finish_reason
        if finish is FinishReason.STOP and tokens and tokens[-1] in self._stop_ids:
            tokens = tokens[:-1]  # it says "the end" and is no part of the text
        piece = self._stream.push(tokens)
        text = piece.text
        if piece.stopped:
            self.completion_tokens += piece.tokens - len(delta.token_ids[skip:])
            finish = FinishReason.STOP
        elif finish is not None:
            text += self._stream.flush()
        if finish is not None:
            self.finish_reason = finish.value
        entries = self._entries(tokens[: piece.tokens], logprobs)
        text, self._echo = self._echo + text, ""
        return Update(self.index, text, entries, self.finish_reason)

    def _entries(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self._request.params.logprobs is None or not tokens:
            return None
        pairs = list(zip(tokens, logprobs, strict=False))
        return (
            {"content": [self._chat_entry(*pair) for pair in pairs], "refusal": None}
            if self._chat
            else self._completion_entries(pairs)
        )

    def _chat_entry(self, token: int, logprob: TokenLogprobs) -> dict[str, Any]:
        return {
            **self._named(token, logprob.chosen),
            "top_logprobs": [self._named(id_, value) for id_, value in logprob.top],
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}

    def _completion_entries(self, pairs: Sequence[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        out: dict[str, Any] = {key: [] for key in _COMPLETION_KEYS}
        for token, logprob in pairs:
            text = self._tokenizer.token_bytes(token).decode("utf-8", "replace")
            out["tokens"].append(text)
            out["token_logprobs"].append(_finite(logprob.chosen))
            names: dict[str, float] = {}
            for id_, value in logprob.top:  # most likely first: of two tokens with one text, the likelier counts
                names.setdefault(self._tokenizer.token_bytes(id_).decode("utf-8", "replace"), _finite(value))
            out["top_logprobs"].append(names)
            out["text_offset"].append(self._offset)
            self._offset += len(text)
        return out


_COMPLETION_KEYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def merged(updates: Sequence[Update]) -> Update:
    """All updates of one choice as one."""
    parts = [update.logprobs for update in updates if update.logprobs is not None]
    logprobs: dict[str, Any] | None = None
    if parts:
        # "refusal" is null in every part; the other keys hold lists
        logprobs = {
            key: None if value is None else [entry for part in parts for entry in part[key]]
            for key, value in parts[0].items()
        }
    return Update(updates[-1].index, "".join(update.text for update in updates), logprobs, updates[-1].finish_reason)


def usage(prompt_tokens: int, choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """OpenAI's usage object. A prompt's cached tokens are those of the first of its `n` choices, since the prompt is
    counted once."""
    completion = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in choices[::n])},
    }


@dataclass
class Reply:
    """The JSON of one reply, whole or in chunks."""

    id: str
    model: str
    created: int  # seconds since the epoch
    system_fingerprint: str | None
    chat: bool
    include_usage: bool = False
    _begun: set[int] = field(default_factory=set)

    def whole(self, updates: Iterable[Update], used: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for update in updates:
            body = (
                {"message": {"role": "assistant", "content": update.text, "refusal": None}}
                if self.chat
                else {"text": update.text}
            )
            choices.append(
                {"index": update.index, **body, "logprobs": update.logprobs, "finish_reason": update.finish_reason}
            )
        return {**self._head("chat.completion" if self.chat else "text_completion"), "choices": choices, "usage": used}

    def chunks(self, update: Update) -> list[dict[str, Any]]:
        """The chunks for one update: before a chat choice's first the one with its role, and the finish reason in one
        of its own."""
        out = []
        if self.chat and update.index not in self._begun:
            self._begun.add(update.index)
            out.append(self._chunk(update.index, {"role": "assistant", "content": "", "refusal": None}))
        if update.text or update.logprobs is not None:
            out.append(self._chunk(update.index, {"content": update.text}, update.text, update.logprobs))
        if update.finish_reason is not None:
            out.append(self._chunk(update.index, {}, finish_reason=update.finish_reason))
        return out

    def usage_chunk(self, used: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(self._chunk_object), "choices": [], "usage": used}

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        text: str = "",
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"delta": delta} if self.chat else {"text": text}
        chunk = {
            **self._head(self._chunk_object),
            "choices": [{"index": index, **body, "logprobs": logprobs, "finish_reason": finish_reason}],
        }
        return {**chunk, "usage": None} if self.include_usage else chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON. The three line separators outside ASCII are escaped, since some clients split events with
    str.splitlines."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char, escaped in (("\u2028", "\\u2028"), ("\u2029", "\\u2029"), ("\x85", "\\u0085")):
        if char in text:
            text = text.replace(char, escaped)
    return text.encode()


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB
