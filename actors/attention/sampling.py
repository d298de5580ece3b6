"""From a step's logits to tokens: the logits processors of each request, then the kernels' draw.

A logits processor changes one row, by what that row's own request asks for and by the tokens of that request before
it. It reads nothing else, so that a token's bits depend on no other row; and a row pays only for the processors that
its request needs. A further sampling parameter is a field of SamplingParams, a field of the HTTP body, and a processor
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from isotherm.actors.attention.grammar_state import GrammarState
from isotherm.actors.attention.masks import Ask, Masks, StepMasks
from isotherm.cluster.engine.sequence import Chunk, Sampled, ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams, TokenLogprobs
from isotherm.kernels.ops import Kernels
from isotherm.kernels.reference import candidates

LARGEST = torch.finfo(torch.float32).max
_TOKENS_BEFORE_A_THOUGHT = 2
LEAST_TEMPERATURE = 1e-5  # below it sampling is greedy: logits divided by much less are infinite in float32


def temperature_of(params: SamplingParams) -> float:
    """By which logits are divided; 0 where the likeliest token is taken."""
    return params.temperature if params.temperature >= LEAST_TEMPERATURE else 0.0


class TokenCounts:
    """Which tokens one request has so far, each once, and how often they are in its output."""

    def __init__(self, prompt: Sequence[int]):
        self._place: dict[int, int] = {}
        self._ids, self._times = np.empty(64, dtype=np.int64), np.zeros(64, dtype=np.float32)
        self._taken = 0  # output tokens that are counted
        for token in prompt:
            self._place_of(token)

    def _place_of(self, token: int) -> int:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._times = np.concatenate([self._times, np.zeros_like(self._times)])
        self._ids[place] = token
        return place

    def take(self, output: Sequence[int]) -> None:
        """Count those of the output tokens that are new since the last call."""
        for token in output[self._taken :]:
            place = self._place_of(token)  # it may make room, so it comes before the array is looked up
            self._times[place] += 1
        self._taken = len(output)

    def with_draft(self, draft: Sequence[int]) -> TokenCounts:
        """A copy that has these tokens too, which may turn out to be wrong."""
        copy = TokenCounts(())
        copy._place, copy._ids, copy._times, copy._taken = dict(self._place), self._ids.copy(), self._times.copy(), 0
        copy.take(draft)
        return copy

    @property
    def ids(self) -> Tensor:
        """int64 [n]"""
        return torch.from_numpy(self._ids[: len(self._place)])

    @property
    def times(self) -> Tensor:
        """float32 [n]: how often each is in the output."""
        return torch.from_numpy(self._times[: len(self._place)])


class SequenceSampling:
    """What the sampler keeps with a sequence."""

    def __init__(self, request: GenerationRequest):
        self.params = request.params
        self.temperature = temperature_of(self.params)
        self.chain = tuple(act for needs, act in PROCESSORS if needs(self.params))
        constraint = self.params.constraint
        self.grammar = None if constraint is None else GrammarState(constraint)
        self.is_plain = not self.chain and self.params.logprobs is None  # but for the grammar
        self._prompt = request.prompt
        self._counts: TokenCounts | None = None

    def counts(self, output: Sequence[int], draft: Sequence[int]) -> TokenCounts:
        """Of prompt, output and draft."""
        if self._counts is None:
            self._counts = TokenCounts(self._prompt)
        self._counts.take(output)
        return self._counts.with_draft(draft) if draft else self._counts


def _own(sequence: ScheduledSequence) -> SequenceSampling:
    own = sequence.sampling
    if not isinstance(own, SequenceSampling):
        own = sequence.sampling = SequenceSampling(sequence.request)
    return own


def _asks(chunks: Sequence[Chunk]) -> list[Ask]:
    """Which masks a step needs."""
    asks, row = [], 0
    for chunk in chunks:
        sequence = chunk.sequence
        if chunk.sample and (state := _own(sequence).grammar) is not None:
            stops = sequence.request.params.stop_token_ids
            asks.append(Ask(row, state, sequence.tokens, sequence.prompt_length, stops, chunk.draft))
        row += chunk.samples
    return asks


@dataclass(frozen=True)
class Row:
    """One row of logits that gives a token."""

    params: SamplingParams
    output: Sequence[int]  # the request's output tokens before the one that it gives
    counts: Callable[[], TokenCounts]  # of these and the prompt's; only a processor that asks pays for them


def penalise(row: Row, logits_V: Tensor) -> None:
    """Repetition penalty (Keskar et al. 2019, arXiv:1909.05858, §4.1) on tokens of prompt and output, then OpenAI's
    frequency and presence penalties on those of the output."""
    params, counts = row.params, row.counts()
    ids, times = counts.ids.to(logits_V.device), counts.times.to(logits_V.device)
    values = logits_V[ids]
    if params.repetition_penalty != 1:
        values = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        values = values.clamp(max=LARGEST)  # a tiny penalty makes a logit infinite
    if params.frequency_penalty:
        values = values - params.frequency_penalty * times
    if params.presence_penalty:
        values = values - params.presence_penalty * (times > 0)
    logits_V[ids] = values


def bias(row: Row, logits_V: Tensor) -> None:
    """OpenAI's logit_bias: -100 and 100 are as good as never and always."""
    tokens, values = zip(*row.params.logit_bias, strict=True)
    logits_V[torch.tensor(tokens, device=logits_V.device)] += torch.tensor(values, device=logits_V.device)


def ban(row: Row, logits_V: Tensor) -> None:
    """A token that would complete a bad word is not drawn."""
    output = row.output
    last = [
        word[-1]
        for word in row.params.bad_words
        if len(word) == 1 or tuple(output[max(0, len(output) - len(word) + 1) :]) == word[:-1]
    ]
    if last:
        logits_V[torch.tensor(last, device=logits_V.device)] = -math.inf


def go_on(row: Row, logits_V: Tensor) -> None:
    """Before `min_tokens` no token that ends the stream is drawn, unless a grammar lets nothing else follow."""
    if len(row.output) < row.params.min_tokens:
        ends = torch.tensor(row.params.stop_token_ids, device=logits_V.device)
        before = logits_V[ends]
        logits_V[ends] = -math.inf
        if row.params.constraint is not None and bool(torch.isneginf(logits_V.max())):
            logits_V[ends] = before


def end_thought(row: Row, logits_V: Tensor) -> None:
    """A thought that has had its tokens, and has not ended in them, is ended: of what ends it, one token after the
    other is the only one that can be drawn."""
    end, most = row.params.thought_end, row.params.max_thinking_tokens
    assert most is not None
    if len(row.output) < most or (start := _thought_start(row)) is None:
        return
    over = len(row.output) - start - most
    if not 0 <= over < len(end):
        return
    thought = tuple(row.output[start : start + most])
    if any(thought[i : i + len(end)] == end for i in range(most - len(end) + 1)):
        return
    # The model may have begun to end it by itself.
    begun = next(n for n in range(min(len(end) - 1, most), -1, -1) if thought[most - n :] == end[:n])
    if begun + over < len(end):
        logits_V.fill_(-math.inf)
        logits_V[end[begun + over]] = 0.0


def _thought_start(row: Row) -> int | None:
    """The index of the thought's first token in the output, if there is a thought. Before what begins it there may be
    some white space, which token ids do not tell."""
    begin = row.params.thought_begin
    first = tuple(row.output[: _TOKENS_BEFORE_A_THOUGHT + len(begin)])
    ends = range(len(begin), len(first) + 1)
    return next((at for at in ends if first[at - len(begin) : at] == begin), None)


def cut_unlikely(row: Row, logits_V: Tensor) -> None:
    """Min-p (Nguyen et al. 2024, arXiv:2407.01082): leave the tokens whose probability, at the row's temperature, is at
    least `min_p` × that of the most likely one."""
    least = float(logits_V.max()) + row.params.temperature * math.log(row.params.min_p)
    logits_V.masked_fill_(logits_V < least, -math.inf)


def _is_penalised(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty) or params.repetition_penalty != 1


# In the order in which they act: who needs it, and what it does to a row. What masks tokens comes after what changes
# their logits, and before what looks at how likely they are.
PROCESSORS: tuple[tuple[Callable[[SamplingParams], bool], Callable[[Row, Tensor], None]], ...] = (
    (_is_penalised, penalise),
    (lambda params: bool(params.logit_bias), bias),
    (lambda params: bool(params.bad_words), ban),
    (lambda params: params.min_tokens > 0 and bool(params.stop_token_ids), go_on),
    (lambda params: params.max_thinking_tokens is not None and bool(params.thought_end), end_thought),
    (lambda params: params.min_p > 0 and temperature_of(params) > 0, cut_unlikely),
)


# Fields of SamplingParams, and of the HTTP body, by which a request has tokens that it never draws. (`min_tokens` gives
# way to a grammar.)
BANS = ("bad_words",)


def nothing_left(own: SequenceSampling, generated: int) -> Sampled:
    """For a row of which the grammar forbids what the request's bans leave, and they what the grammar leaves."""
    bans = [name for name in BANS if getattr(own.params, name)]
    if not bans:
        assert own.grammar is not None
        return Sampled(-1, error=own.grammar.named("all that it allows is infinitely unlikely"))
    why = (
        f"{bans[0]}: no token can come after {generated} tokens of output: what the request holds its output to (by a "
        f"response_format, a schema, a grammar, tools that must be called, …) leaves only what {' and '.join(bans)} "
        "forbids"
    )
    return Sampled(-1, error=why, error_param=bans[0])


NO_NUMBERS = "the model's logits are no numbers: its weights, or what it computed, are not finite"


class Sampler:
    """`masks`: for requests with a constraint."""

    def __init__(self, kernels: Kernels, masks: Masks | None = None):
        self._kernels, self.masks = kernels, masks
        self._step_masks: Callable[[], StepMasks] | None = None

    def begin(self, chunks: Sequence[Chunk]) -> None:
        """A step is about to be computed, and then sampled: what can be done meanwhile is begun."""
        self._step_masks = None
        if any(chunk.sample and chunk.sequence.request.params.constraint is not None for chunk in chunks):
            if self.masks is None:
                raise ValueError("a request has a constraint, and this engine has no tokenizer to hold it by")
            self._step_masks = self.masks.begin(lambda: _asks(chunks))

    def sample(self, chunks: Sequence[Chunk], logits_NV: Tensor) -> list[Sampled]:
        """A token for each row that `chunks` sample, in order. logits_NV: float32, a row for each of them; changed
        where processors act."""
        rows: list[SequenceSampling] = []
        indices: list[int] = []
        plain, held = True, False
        for chunk in chunks:
            if chunk.sample:
                own = _own(chunk.sequence)
                first = chunk.sequence.generated
                for after in range(1 + len(chunk.draft)):
                    rows.append(own)
                    indices.append(first + after)
                plain = plain and own.is_plain
                held = held or own.grammar is not None
        if not rows:
            return []
        masks, dead = None, frozenset[int]()
        if held:
            assert self._step_masks is not None, "a step with constrained rows is begun before it is sampled"
            masks = self._step_masks()
        with torch.inference_mode():
            if plain:
                if masks is not None:
                    masks.apply(self._kernels, logits_NV)
                sampled = list(map(Sampled, self._draw(rows, indices, logits_NV)))
            else:
                told, dead = self._process(chunks, rows, logits_NV, masks)
                sampled = [
                    Sampled(token, None if (n := own.params.logprobs) is None else token_logprobs(logits_V, token, n))
                    for own, token, logits_V in zip(rows, self._draw(rows, indices, logits_NV), told, strict=True)
                ]
        for i, one in enumerate(sampled):
            if one.token_id < 0:
                sampled[i] = Sampled(-1, error=NO_NUMBERS)
        for i in dead:
            sampled[i] = nothing_left(rows[i], indices[i])
        for i, why in masks.errors.items() if masks is not None else ():
            own_grammar = rows[i].grammar
            sampled[i] = Sampled(-1, error=why, error_param="" if own_grammar is None else own_grammar.param)
        return sampled

    def _process(
        self, chunks: Sequence[Chunk], rows: Sequence[SequenceSampling], logits_NV: Tensor, masks: StepMasks | None
    ) -> tuple[list[Tensor], frozenset[int]]:
        """The logits whose log-probabilities each row is to tell: as they were before, or as they are drawn from. And
        the constrained rows in which nothing is left to draw."""
        told, i = list(logits_NV), 0
        if masks is not None:  # before the processors, for all rows at once: what is forbidden stays so in each of them
            for row in masks.rows:
                if rows[row].params.logprobs is not None and not rows[row].params.processed_logprobs:
                    told[row] = logits_NV[row].clone()
            masks.apply(self._kernels, logits_NV)
        for chunk in chunks:
            sequence = chunk.sequence
            for after in range(chunk.samples):
                own = rows[i]
                tells = own.params.logprobs is not None
                if own.chain and own.grammar is None and tells and not own.params.processed_logprobs:
                    told[i] = logits_NV[i].clone()
                if own.chain:
                    output = sequence.tokens[sequence.prompt_length :]
                    draft = chunk.draft[:after]
                    one = Row(own.params, [*output, *draft] if draft else output, partial(own.counts, output, draft))
                    for act in own.chain:
                        act(one, logits_NV[i])
                if tells and own.params.processed_logprobs:
                    told[i] = drawn_from(own, logits_NV[i])
                i += 1
        held = () if masks is None else masks.rows
        dead = frozenset(row for row in held if rows[row].chain and bool(torch.isneginf(logits_NV[row].max())))
        for row in dead:
            logits_NV[row] = 0.0  # of nothing but minus infinity no distribution can be made
        return told, dead

    def _draw(self, rows: Sequence[SequenceSampling], indices: Sequence[int], logits_NV: Tensor) -> list[int]:
        temperatures = [own.temperature for own in rows]
        return drawn(self._kernels, logits_NV, [own.params for own in rows], temperatures, indices)


def drawn(
    kernels: Kernels,
    logits_NV: Tensor,
    params: Sequence[SamplingParams],
    temperatures: Sequence[float],
    indices: Sequence[int],
) -> list[int]:
    """A token for each row, with the noise of its index among its request's output tokens."""
    if not any(temperatures):
        greedy: list[int] = kernels.sample(logits_NV, *_nothing(len(params))).tolist()
        return greedy
    tokens: list[int] = kernels.sample(
        logits_NV,
        *(torch.from_numpy(np.array(x, np.float64)) for x in (temperatures, [p.top_p for p in params])),
        *(
            torch.from_numpy(np.array(x, np.int64))
            for x in ([p.top_k for p in params], [p.seed for p in params], indices)
        ),
    ).tolist()
    return tokens


@lru_cache(64)
def _nothing(rows: int) -> tuple[Tensor, ...]:
    """What rows are drawn by that take their likeliest token: temperature, and what says nothing then."""
    reals, integers = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
    return reals, reals, integers, integers, integers


def drawn_from(own: SequenceSampling, logits_V: Tensor) -> Tensor:
    """The logits that a token is drawn from, after temperature, top-k and top-p; a greedy row has no temperature."""
    if not own.temperature:
        return logits_V
    ids, values = candidates(logits_V / own.temperature, own.params.top_p, own.params.top_k)
    return torch.full_like(logits_V, -math.inf).index_copy_(0, ids, values)


def token_logprobs(logits_V: Tensor, token: int, top: int) -> TokenLogprobs:
    """Log-probabilities of one row of logits: the chosen token's and the `top` largest."""
    logprobs = logits_V.log_softmax(-1)
    values, ids = logprobs.topk(top)
    return TokenLogprobs(float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
