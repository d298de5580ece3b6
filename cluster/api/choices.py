"""From an engine's token deltas to what they add to a choice, field by field: content, reasoning, tool calls, logprobs,
finish reason; and the count of tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from isotherm.cluster.api.logprobs import (
    PromptReport,
    PromptScores,
    TextOffsets,
    chat_entries,
    completion_entries,
    joined_entries,
)
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, TokenLogprobs
from isotherm.cluster.text.output import LastCall, OutputFields, OutputParser, joined
from isotherm.cluster.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from isotherm.cluster.api.replies import Usage


class GenerationError(IsothermError):
    """The engine gave up on a request: an HTTP error before the first token, an error event after it."""


class OwnFaultError(GenerationError):
    """… since it asks for what cannot be: the same request would fail again. `param`: the field to mend, with which the
    message begins."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class LogprobForm(Enum):
    """Which of OpenAI's two forms logprobs have."""

    CHAT = "chat"  # a list of objects
    COMPLETION = "completion"  # an object of lists


@dataclass(frozen=True)
class ChoiceDelta:
    """What is added to a choice. `logprobs` are in OpenAI's form, one entry for each token in order, whatever field
    its text is in; `finish_reason` is OpenAI's word, in the last delta only, and `stop` the stop string that is the
    reason; `cuts_call`: it ends within a tool call. `token_ids` are there where they are asked for, `prompt` in one
    delta where something is to be said of the prompt's tokens."""

    index: int
    fields: OutputFields
    logprobs: JSON | None = None
    finish_reason: str | None = None
    token_ids: tuple[int, ...] = ()
    prompt: PromptReport | None = None
    stop: str | None = None
    cuts_call: bool = False
    thought_tokens: int = 0  # so many of its tokens, the first ones, are the thought's
    cached_tokens: int = 0  # of the prompt
    pieces: tuple[ChoiceDelta, ...] = field(default=(), repr=False, compare=False)  # of which it was merged
    used: Usage | None = None  # by the whole reply so far, where it was asked for

    @property
    def is_empty(self) -> bool:
        said = self.logprobs is not None or self.prompt is not None or bool(self.token_ids)
        return self.fields.is_empty and not said and self.finish_reason is None


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
        logprob_form: LogprobForm | None,
        echo: str,
        include_stop: bool = False,
        tells_token_ids: bool = False,
        scores: PromptScores | None = None,
    ) -> None:
        """`logprob_form`: None where they are not shown. `scores`: what takes the prompt's log-probabilities, where the
        request asks for them."""
        self.index = index
        self.completion_tokens = 0
        self.reasoning_tokens = 0  # of these, the thought's and its closing tag
        self.cached_tokens = 0
        self.drafts_accepted = self.drafts_rejected = 0
        self.logprob_sum = 0.0  # of the tokens that count, where the request asks for log-probabilities
        self.finish_reason: str | None = None
        self._request = request
        self._tokenizer = tokenizer
        self._parser = parser
        self._stream = tokenizer.stream(
            stop, skip_special_tokens, lambda: parser.tags, request.params.min_tokens, include_stop
        )
        self._stop_ids = frozenset(request.params.stop_token_ids)
        self._ends = tokenizer.eos_token_ids
        self._logprob_form = logprob_form
        self._echo = echo
        self._offsets = TextOffsets(len(echo))
        self._token_text = tokenizer.visible_bytes if skip_special_tokens else tokenizer.token_bytes
        self._include_stop = include_stop
        self._tells_token_ids = tells_token_ids
        self._scores = scores
        self.scores_many = scores is not None and scores.is_large

    def is_long(self, delta: Delta | ChoiceDelta) -> bool:
        """Whether what is made of it takes so long that it is a thread's work, for all that is said of the prompt."""
        return self.scores_many and delta.prompt is not None

    @property
    def mean_logprob(self) -> float:
        return self.logprob_sum / max(1, self.completion_tokens)

    def feed(self, delta: Delta) -> ChoiceDelta:
        """Takes the next delta. After one that sets `finish_reason` there is no other. Raises GenerationError on the
        engine's error, and on a gap."""
        if delta.finish_reason is FinishReason.ERROR and delta.error_param:
            raise OwnFaultError(delta.error, delta.error_param)
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
        if delta.prompt is not None and self._scores is not None:
            self._scores.take(delta.prompt)
        # A stop token says "the end" and is no part of the text, unless it is asked for.
        ended = finish is FinishReason.STOP and tokens and tokens[-1] in self._stop_ids and not self._include_stop
        text_tokens = tokens[:-1] if ended else tokens
        thought_before = self.reasoning_tokens
        pieces, read, stopped = self._read(text_tokens)
        count = read if stopped else len(tokens)
        self.completion_tokens += count
        guessed = min(delta.drafts_accepted, count)  # a stop string may leave some of them out
        self.drafts_accepted += guessed
        self.drafts_rejected += delta.drafts_rejected + delta.drafts_accepted - guessed
        self.logprob_sum += sum(logprob.chosen for logprob in logprobs[:count])
        if stopped:
            finish = FinishReason.STOP
        if finish is not None:
            pieces += [self._parser.feed(self._stream.flush()), self._parser.finish()]
            if self._stream.stopped:  # by what was held back till now
                finish = FinishReason.STOP
        fields = pieces[0] if len(pieces) == 1 else joined(pieces)
        cuts_call = False
        if finish is not None:
            by_itself = not (stopped or self._stream.stopped) and bool(tokens) and tokens[-1] in self._ends
            called, cuts_call = _calls(self._parser.last_call, finish, by_itself)
            self.finish_reason = "tool_calls" if called else finish.value
        report = self._prompt_report()
        if self._echo and self._scores is None:
            fields, self._echo = replace(fields, content=self._echo + fields.content), ""
        counted = tokens[:count] if self._logprob_form is LogprobForm.COMPLETION else text_tokens[:read]
        return ChoiceDelta(
            self.index,
            fields,
            logprobs=self._entries(counted, logprobs),
            finish_reason=self.finish_reason,
            token_ids=tokens[:count] if self._tells_token_ids else (),
            prompt=report,
            stop=self._stream.stopped_by,
            cuts_call=cuts_call,
            thought_tokens=self.reasoning_tokens - thought_before,
            cached_tokens=self.cached_tokens,
        )

    def _prompt_report(self) -> PromptReport | None:
        """Once, as soon as it can be made."""
        report = None if self._scores is None else self._scores.report()
        if report is not None:
            self._scores = None
        return report

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
        if self._request.params.logprobs is None or self._logprob_form is None or not tokens:
            return None
        pairs = zip(tokens, logprobs, strict=False)
        if self._logprob_form is LogprobForm.CHAT:
            return chat_entries(self._tokenizer, pairs)
        offsets = (self._offsets.take(self._token_text(token)) for token in tokens)
        return completion_entries(self._tokenizer, ((*pair, at) for pair, at in zip(pairs, offsets, strict=False)))


def _calls(last: LastCall, finish: FinishReason, by_itself: bool) -> tuple[bool, bool]:
    """Whether a choice ends for its tool calls, and whether its last one was cut. Models leave out the tags that close
    a call; where something else than the model (`by_itself`) ended the text, nobody knows whether it would have."""
    whole = last is LastCall.CLOSED or (last is LastCall.UNMARKED and by_itself)
    return whole and finish is FinishReason.STOP, not whole and last is not LastCall.NONE


def merged(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """All deltas of one choice as one."""
    last = deltas[-1]
    return ChoiceDelta(
        last.index,
        joined(delta.fields for delta in deltas),
        logprobs=joined_entries(delta.logprobs for delta in deltas),
        finish_reason=last.finish_reason,
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        prompt=next((delta.prompt for delta in deltas if delta.prompt is not None), None),
        stop=last.stop,
        cuts_call=last.cuts_call,
        pieces=tuple(deltas),
    )


def best(deltas: Sequence[ChoiceDelta], choices: Sequence[ChoiceStream], samples: int, n: int) -> list[ChoiceDelta]:
    """The `n` of each prompt's `samples` choices whose tokens have the highest log-probability on average, best first
    (the earlier one of two equals), under new indices."""
    if n == samples:
        return list(deltas)
    kept: list[ChoiceDelta] = []
    for begin in range(0, len(deltas), samples):
        ranked = sorted(range(begin, begin + samples), key=lambda i: -choices[i].mean_logprob)
        kept += [replace(deltas[i], index=len(kept) + place) for place, i in enumerate(ranked[:n])]
    return kept
