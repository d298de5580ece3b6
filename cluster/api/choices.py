"""From an engine's token deltas to what they add to a choice, field by field: content, reasoning, tool calls, logprobs,
finish reason; and the count of tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, TokenLogprobs
from isotherm.cluster.text.output import OutputFields, OutputParser, joined
from isotherm.cluster.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from isotherm.cluster.api.replies import Usage

_LOWEST_LOGPROB = -9999.0  # what OpenAI gives for minus infinity, which JSON can't say


class GenerationError(IsothermError):
    """The engine gave up on a request: an HTTP error before the first token, an error event after it."""


class LogprobForm(Enum):
    """Which of OpenAI's two forms logprobs have."""

    CHAT = "chat"  # a list of objects
    COMPLETION = "completion"  # an object of lists


@dataclass(frozen=True)
class ChoiceDelta:
    """What is added to a choice. `logprobs` are in OpenAI's form, one entry for each token in order, whatever field
    its text is in; `finish_reason` is OpenAI's word, in the last delta only."""

    index: int
    fields: OutputFields
    logprobs: JSON | None = None
    finish_reason: str | None = None
    used: Usage | None = None  # by the whole reply so far, where it was asked for

    @property
    def is_empty(self) -> bool:
        return self.fields.is_empty and self.logprobs is None and self.finish_reason is None


class ChoiceStream:
    """One stream of the reply: turns the engine's deltas into the choice's, and counts tokens."""

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        parser: OutputParser,
        *,
        stop: Sequence[str],
        skip_special_tokens: bool,
        logprob_form: LogprobForm,
        echo: str,
    ) -> None:
        self.index = index
        self.completion_tokens = 0
        self.reasoning_tokens = 0  # of these, the thought's and its closing tag
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self._request = request
        self._tokenizer = tokenizer
        self._parser = parser
        self._stream = tokenizer.stream(stop, skip_special_tokens, lambda: parser.tags, request.params.min_tokens)
        self._stop_ids = frozenset(request.params.stop_token_ids)
        self._called_tools = False
        self._logprob_form = logprob_form
        self._echo = echo
        self._offset = len(echo)

    def feed(self, delta: Delta) -> ChoiceDelta:
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
        finish = delta.finish_reason
        # A stop token says "the end" and is no part of the text.
        text_tokens = tokens[:-1] if finish is FinishReason.STOP and tokens and tokens[-1] in self._stop_ids else tokens
        pieces, read, stopped = self._read(text_tokens)
        self.completion_tokens += read if stopped else len(tokens)
        if stopped:
            finish = FinishReason.STOP
        if finish is not None:
            pieces += [self._parser.feed(self._stream.flush()), self._parser.finish()]
            if self._stream.stopped:  # by what was held back till now
                finish = FinishReason.STOP
        fields = pieces[0] if len(pieces) == 1 else joined(pieces)
        self._called_tools |= bool(fields.tool_calls)
        if finish is not None:
            called = self._called_tools and finish is FinishReason.STOP
            self.finish_reason = "tool_calls" if called else finish.value
        if self._echo:
            fields, self._echo = replace(fields, content=self._echo + fields.content), ""
        return ChoiceDelta(self.index, fields, self._entries(text_tokens[:read], logprobs), self.finish_reason)

    def _read(self, tokens: Sequence[int]) -> tuple[list[OutputFields], int, bool]:
        """The tokens' text by field, how many of them count, and whether the last of these completed a stop string, or
        what the parser takes."""
        pieces: list[OutputFields] = []
        read = 0
        while read < len(tokens):
            thinking = self._parser.is_reasoning
            piece = self._stream.push(tokens[read : read + 1] if self._parser.tags else tokens[read:])
            pieces.append(self._parser.feed(piece.text))
            if thinking or self._parser.is_reasoning:
                self.reasoning_tokens += piece.tokens
            read += piece.tokens
            if piece.stopped or self._parser.is_over:
                return pieces, read, True
        return pieces, read, False

    def _entries(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> JSON | None:
        if self._request.params.logprobs is None or not tokens:
            return None
        pairs = list(zip(tokens, logprobs, strict=False))
        return (
            {"content": [self._chat_entry(*pair) for pair in pairs], "refusal": None}
            if self._logprob_form is LogprobForm.CHAT
            else self._completion_entries(pairs)
        )

    def _chat_entry(self, token: int, logprob: TokenLogprobs) -> JSON:
        return {
            **self._named(token, logprob.chosen),
            "top_logprobs": [self._named(id_, value) for id_, value in logprob.top],
        }

    def _named(self, token: int, logprob: float) -> JSON:
        data = self._tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}

    def _completion_entries(self, pairs: Sequence[tuple[int, TokenLogprobs]]) -> JSON:
        out: JSON = {key: [] for key in _COMPLETION_KEYS}
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


def merged(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """All deltas of one choice as one."""
    parts = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    logprobs: JSON | None = None
    if parts:
        # "refusal" is null in every part; the other keys hold lists
        logprobs = {
            key: None if value is None else [entry for part in parts for entry in part[key]]
            for key, value in parts[0].items()
        }
    last = deltas[-1]
    return ChoiceDelta(last.index, joined(delta.fields for delta in deltas), logprobs, last.finish_reason)


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB
