"""What a request is between the ingress and the attention shard: token ids in, deltas of token ids out. Knows nothing
about text."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, replace
from enum import Enum


class FinishReason(str, Enum):
    STOP = "stop"  # an end-of-sequence or stop token, or (at the ingress) a stop string
    LENGTH = "length"  # max_tokens, or the model's or the cache's context length
    ABORT = "abort"  # the client went away
    ERROR = "error"  # the request alone failed; Delta.error says why
    REFUSED = "refused"  # the shard's queue is full; nothing was begun, and a later try may be taken
    LOST = "lost"  # its shard was lost; said by the ingress replica to itself, which resubmits the request
    MISSED = "missed"  # as LOST, but the shard may have been dead before it was sent the request
    MOVED = "moved"  # the shard gave it back; the ingress resubmits it elsewhere, and the client never sees this


@dataclass(frozen=True)
class Constraint:
    """What the output's text may be. Where `after` is given the output begins with a thought that is free: the grammar
    holds after the first token that is one of these."""

    grammar: str  # llguidance's: Lark text, or its JSON form
    after: tuple[int, ...] = ()
    param: str = ""  # the request's field that asks for it


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. `seed` is always set (the ingress draws one where the client gave none): with the prompt
    and these parameters it determines every token."""

    max_tokens: int  # 0: only the prompt is computed, for its log-probabilities
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # below 1: off
    _: KW_ONLY
    min_p: float = 0.0  # tokens less likely than this × the most likely one are out of the question; 0: off
    presence_penalty: float = 0.0  # off the logit of a token that the output has
    frequency_penalty: float = 0.0  # off it for each time that the output has it
    repetition_penalty: float = 1.0  # by which the logit of a token of prompt or output is divided, below 0 multiplied
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    min_tokens: int = 0  # before so many output tokens none of `stop_token_ids` is drawn
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # end-of-sequence ids included, unless the request ignores them
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids that the output never has in a row
    thought_begin: tuple[int, ...] = ()  # what begins a thought, first in the output; none: the output begins in one
    thought_end: tuple[int, ...] = ()  # what ends a thought that has `max_thinking_tokens`, if it has not ended before
    max_thinking_tokens: int | None = None
    logprobs: int | None = None  # None: none; n: the chosen token's and the n most likely ones'
    constraint: Constraint | None = None
    processed_logprobs: bool = False  # of the distribution that tokens are drawn from, not of the model's own
    prompt_logprobs: int | None = None  # as `logprobs`, of each prompt token after the first; of the model's own
    speculate: bool = True  # its tokens may be guessed before they are computed, which changes none of them


@dataclass(frozen=True)
class GenerationRequest:
    """One stream. `generated` is what was already sent before the request came to this shard (a resubmission after a
    loss): those tokens are recomputed in decode form, count towards max_tokens, and are not sent again. Nor are the
    log-probabilities of the first `scored` prompt tokens after the first of all. `accepted`: a shard had it before, so
    that a full queue is no reason to refuse it."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    generated: tuple[int, ...] = ()
    accepted: bool = False
    priority: int = 0  # lower ones have their turn first
    key: str = ""  # name of the API key that it came with: requests of one priority are shared out over keys, by weight
    weight: float = 1.0  # its key's share beside other keys
    tenant: str = ""  # requests of one tenant share a prefix cache, and those of none
    family: str = ""  # those of one family have one prompt, which is computed once for all of them
    scored: int = 0
    fingerprint: str = ""  # its reply's: no shard with other weights may have it; empty: any may

    def resumed(self, generated: tuple[int, ...], scored: int = 0) -> GenerationRequest:
        """The same request after `generated` tokens, and the log-probabilities of `scored` prompt tokens, reached the
        client, for another shard."""
        return replace(self, generated=generated, scored=scored, accepted=True)


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities at one position: of the model's distribution (temperature 1, nothing cut), unless the
    request asks for that after processing."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()  # most likely first
    rank: int = 0  # of the chosen token among all, 1 being the most likely; 0: not asked for


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of consecutive prompt tokens; `start` is the index of the first of them in the prompt. The
    prompt's first token has none."""

    start: int
    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class Course:
    """How a request fared, for whoever looks at it afterwards: at the shard that has it, but for moves. `chunks`: when
    each part of its prompt was computed, in seconds since it came there, and of how many tokens it was."""

    chunks: tuple[tuple[float, int], ...] = ()
    preemptions: int = 0
    group_wait: float = 0.0  # seconds for which the shard waited for expert groups since the request's first turn
    moved: int = 0  # times that a shard gave it back
    resumed: int = 0  # times that it went on elsewhere after its shard was lost


@dataclass(frozen=True, init=False)
class Delta:
    """New tokens of one request, from one engine step or several. `start` is the index of the first of them among the
    request's output tokens, so a receiver can tell a repeat or a gap."""

    request_id: str
    start: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    error: str = ""
    prompt: PromptLogprobs | None = None
    queued_seconds: float = field(default=0.0, compare=False)  # from the request's arrival at the shard to its turn
    course: Course | None = field(default=None, compare=False)  # with the first tokens, the last ones, and after moves
    drafts_accepted: int = field(default=0, compare=False)  # tokens of these that were guessed
    drafts_rejected: int = field(default=0, compare=False)  # guesses that were wrong, or behind a wrong one
    error_param: str = ""  # the request's field that is the cause, where it is the request's own: it would fail again

    def __init__(
        self,
        request_id: str,
        start: int,
        token_ids: tuple[int, ...] = (),
        finish_reason: FinishReason | None = None,
        logprobs: tuple[TokenLogprobs, ...] = (),
        cached_tokens: int = 0,
        error: str = "",
        prompt: PromptLogprobs | None = None,
        queued_seconds: float = 0.0,
        course: Course | None = None,
        drafts_accepted: int = 0,
        drafts_rejected: int = 0,
        error_param: str = "",
    ) -> None:
        """Written out, since one is made for each token of each request: the one that a frozen dataclass has takes
        three times as long."""
        values = self.__dict__
        values["request_id"] = request_id
        values["start"] = start
        values["token_ids"] = token_ids
        values["finish_reason"] = finish_reason
        values["logprobs"] = logprobs
        values["cached_tokens"] = cached_tokens
        values["error"] = error
        values["prompt"] = prompt
        values["queued_seconds"] = queued_seconds
        values["course"] = course
        values["drafts_accepted"] = drafts_accepted
        values["drafts_rejected"] = drafts_rejected
        values["error_param"] = error_param
