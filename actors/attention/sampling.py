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
from functools import partial

import numpy as np
import torch
from torch import Tensor

from isotherm.actors.attention.grammar_state import GrammarState
from isotherm.actors.attention.masks import Ask, Masks, StepMasks
from isotherm.cluster.engine.sequence import Chunk, Sampled, ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams, TokenLogprobs
from isotherm.kernels.ops import Kernels

LARGEST = torch.finfo(torch.float32).max
LEAST_TEMPERATURE = 1e-5  # below it sampling is greedy: logits divided by much less are infinite in float32


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
        self.temperature = self.params.temperature if self.params.temperature >= LEAST_TEMPERATURE else 0.0
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
    index: int  # of the token that it gives, among the request's output tokens
    counts: Callable[[], TokenCounts]  # of the tokens before it; only a processor that asks pays for them


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


def go_on(row: Row, logits_V: Tensor) -> None:
    """Before `min_tokens` no token that ends the stream is drawn, unless a grammar lets nothing else follow."""
    if row.index < row.params.min_tokens:
        ends = torch.tensor(row.params.stop_token_ids, device=logits_V.device)
        before = logits_V[ends]
        logits_V[ends] = -math.inf
        if row.params.constraint is not None and bool(torch.isneginf(logits_V.max())):
            logits_V[ends] = before


def cut_unlikely(row: Row, logits_V: Tensor) -> None:
    """Min-p (Nguyen et al. 2024, arXiv:2407.01082): leave the tokens whose probability, at the row's temperature, is at
    least `min_p` × that of the most likely one."""
    least = float(logits_V.max()) + row.params.temperature * math.log(row.params.min_p)
    logits_V.masked_fill_(logits_V < least, -math.inf)


def _is_penalised(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty) or params.repetition_penalty != 1


# In the order in which they act: who needs it, and what it does to a row.
PROCESSORS: tuple[tuple[Callable[[SamplingParams], bool], Callable[[Row, Tensor], None]], ...] = (
    (_is_penalised, penalise),
    (lambda params: bool(params.logit_bias), bias),
    (lambda params: params.min_tokens > 0 and bool(params.stop_token_ids), go_on),
    (lambda params: params.min_p > 0 and params.temperature >= LEAST_TEMPERATURE, cut_unlikely),
)


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
        masks = None
        if held:
            assert self._step_masks is not None, "a step with constrained rows is begun before it is sampled"
            masks = self._step_masks()
        with torch.inference_mode():
            if plain:
                if masks is not None:
                    masks.apply(logits_NV)
                sampled = list(map(Sampled, self._draw(rows, indices, logits_NV)))
            else:
                unchanged = self._process(chunks, rows, logits_NV, masks)
                sampled = [
                    Sampled(token, None if (n := own.params.logprobs) is None else token_logprobs(logits_V, token, n))
                    for own, token, logits_V in zip(rows, self._draw(rows, indices, logits_NV), unchanged, strict=True)
                ]
        for i, why in masks.errors.items() if masks is not None else ():
            sampled[i] = Sampled(-1, error=why)
        return sampled

    def _process(
        self, chunks: Sequence[Chunk], rows: Sequence[SequenceSampling], logits_NV: Tensor, masks: StepMasks | None
    ) -> list[Tensor]:
        """Each row as it was before, where its log-probabilities are asked for."""
        unchanged, i = list(logits_NV), 0
        if masks is not None:  # before the processors, for all rows at once: what is forbidden stays so in each of them
            for row in masks.rows:
                if rows[row].params.logprobs is not None:
                    unchanged[row] = logits_NV[row].clone()
            masks.apply(logits_NV)
        for chunk in chunks:
            sequence = chunk.sequence
            for after in range(chunk.samples):
                own = rows[i]
                if own.chain and own.grammar is None and own.params.logprobs is not None:
                    unchanged[i] = logits_NV[i].clone()
                if own.chain:
                    output = sequence.tokens[sequence.prompt_length :]
                    counts = partial(own.counts, output, chunk.draft[:after])
                    one = Row(own.params, len(output) + after, counts)
                    for act in own.chain:
                        act(one, logits_NV[i])
                i += 1
        if masks is not None:
            for row in masks.rows:
                own = rows[row]
                if own.chain and own.grammar is not None and bool(torch.isneginf(logits_NV[row].max())):
                    logits_NV[row] = 0.0  # of nothing but minus infinity no distribution can be made
                    masks.errors.setdefault(row, own.grammar.named("the request forbids the rest"))
        return unchanged

    def _draw(self, rows: Sequence[SequenceSampling], indices: Sequence[int], logits_NV: Tensor) -> list[int]:
        params = [own.params for own in rows]
        tokens: list[int] = self._kernels.sample(
            logits_NV,
            torch.tensor([own.temperature for own in rows], dtype=torch.float64),
            torch.tensor([p.top_p for p in params], dtype=torch.float64),
            torch.tensor([p.top_k for p in params]),
            torch.tensor([p.seed for p in params]),
            torch.tensor(indices),
        ).tolist()
        return tokens


def token_logprobs(logits_V: Tensor, token: int, top: int) -> TokenLogprobs:
    """Log-probabilities of one row of logits: the chosen token's and the `top` largest."""
    logprobs = logits_V.log_softmax(-1)
    values, ids = logprobs.topk(top)
    return TokenLogprobs(float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
