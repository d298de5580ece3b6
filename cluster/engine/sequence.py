"""What a step is about: sequences, the chunks of them that it computes, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from isotherm.cluster.engine.kv_blocks import block_key, root_key
from isotherm.cluster.engine.places import BACKGROUND
from isotherm.cluster.messages.requests import Course, GenerationRequest, TokenLogprobs

NOTED_CHUNKS = 64  # of a prompt, whose times are told


class Form(Enum):
    """How attention is computed. Prompt tokens always in prefill form and generated tokens always in decode form, also
    when they are recomputed, so that a token's bits do not depend on what happened to its request."""

    PREFILL = "prefill"  # latents expanded to keys and values
    DECODE = "decode"  # absorbed


@dataclass(eq=False)
class ScheduledSequence:
    """A request in the scheduler. `tokens` = prompt + generated; the first `computed` of them are in the KV cache."""

    request: GenerationRequest
    arrival: int
    tokens: list[int]
    computed: int = 0
    scored: int = 0  # prompt tokens after the first whose log-probabilities have been given out
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the leading full blocks, as far as they were needed
    cached_tokens: int = 0  # prompt tokens found in the prefix cache when the request was first admitted
    preemptions: int = 0
    admitted: bool = False  # it has had blocks
    running: bool = False  # it has blocks now
    virtual_start: float | None = None  # see policy.py
    expected: int = 0  # tokens for which it has taken places, see places.py
    since: float = 0.0  # when it came
    queued: float = 0.0  # seconds from then to its first turn
    chunks: list[tuple[float, int]] = field(default_factory=list)  # as Course has them
    waited_before: float = 0.0  # the scheduler's `waited` at its first turn
    sampling: object = None  # what the sampler keeps with it
    drafting: object = None  # what the drafter keeps with it
    acceptance: object = None  # what became of its drafts (draft_lengths.py)
    verified: tuple[int, int] = (0, 0)  # drafts of its last step that were reached, and of these those that were right

    def note(self, now: float, count: int) -> None:
        """So many of its prompt tokens have been computed. A very long prompt's later parts are noted as one."""
        if len(self.chunks) == NOTED_CHUNKS:
            count += self.chunks.pop()[1]
        self.chunks.append((now - self.since, count))

    def course(self, waited: float) -> Course:
        """How it has fared; `waited` is the scheduler's."""
        return Course(tuple(self.chunks), self.preemptions, waited - self.waited_before)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def is_background(self) -> bool:
        """It yields to what people wait for, see yielding.py."""
        return self.request.priority >= BACKGROUND

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def is_scored(self) -> bool:
        """Nobody waits for log-probabilities of its prompt (any more)."""
        return self.request.params.prompt_logprobs is None or self.scored >= self.prompt_length - 1

    def reusable_blocks(self, block_size: int) -> int:
        """How many leading full blocks of its tokens may come from the prefix cache. The last token is always computed,
        for its logits are needed; so are those of the prompt tokens whose log-probabilities are to be given."""
        return (len(self.tokens) - 1 if self.is_scored else self.scored) // block_size

    def shared_blocks(self, block_size: int) -> int:
        """How many leading blocks it shares with those of its family."""
        return (self.prompt_length - 1) // block_size

    def key(self, index: int, block_size: int) -> bytes:
        """Key of the index-th block, all of whose tokens must be known."""
        while len(self.keys) <= index:
            begin = len(self.keys) * block_size
            prefill = min(max(self.prompt_length - begin, 0), block_size)
            parent = self.keys[-1] if self.keys else root_key(self.request.tenant)
            self.keys.append(block_key(parent, self.tokens[begin : begin + block_size], prefill))
        return self.keys[index]


class Chunk(NamedTuple):
    """Consecutive positions start … start+count-1 of one sequence, all in one form. `sample`: the known tokens end with
    it, so that its last row gives the next one, unless the request wants none. `draft`: tokens that somebody guesses to
    come then; they are the last of the `count`, each is computed in decode form like any generated token, and each row
    of them is sampled too."""

    sequence: ScheduledSequence
    start: int
    count: int  # type: ignore[assignment]  # what hides here is a method of tuples that nobody wants of a chunk
    form: Form
    sample: bool
    draft: tuple[int, ...] = ()

    @property
    def known(self) -> int:
        """How many of its positions hold tokens of the sequence."""
        return self.count - len(self.draft)

    @property
    def token_ids(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.start + self.known], *self.draft]

    @property
    def samples(self) -> int:
        """How many of its last rows are sampled."""
        return 1 + len(self.draft) if self.sample else 0

    @property
    def scores(self) -> range:
        """Indices of the prompt tokens whose log-probabilities its rows are to give, each the row before the token."""
        sequence = self.sequence
        if sequence.request.params.prompt_logprobs is None:
            return range(0)
        last = min(self.start + self.count, sequence.prompt_length - 1)
        return range(max(self.start, sequence.scored) + 1, last + 1)


class Sampled(NamedTuple):
    """What the model gave for one row that is sampled; or why nothing can follow there, and the request cannot go
    on: `error_param` as Delta has it."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str = ""
    error_param: str = ""


def accepted(chunk: Chunk, results: Sequence[Sampled]) -> list[Sampled]:
    """Those of a chunk's results, one for each sampled row, that hold: the first, and after each draft that was guessed
    right the next. They are the tokens that would have come one by one."""
    right = 0
    while right < len(chunk.draft) and chunk.draft[right] == results[right].token_id and not results[right].error:
        right += 1
    return list(results[: right + 1])


def verified(chunk: Chunk, results: Sequence[Sampled]) -> list[Sampled]:
    """Of the results after drafts those that count: up to the first that ends the request, and that one. The sequence
    keeps what became of the drafts."""
    new = accepted(chunk, results)
    reached, right = min(len(chunk.draft), len(new)), len(new) - 1
    stops = chunk.sequence.request.params.stop_token_ids
    end = next((i for i, result in enumerate(new[:right], 1) if result.token_id in stops), None)
    if end is not None:  # it was guessed too
        reached = right = end
        new = new[:end]
    chunk.sequence.verified = reached, right
    return new
