"""From a step's logits to tokens: the logits processors of each request, then the kernels' draw.

A logits processor changes one row, by what that row's own request asks for and by the tokens of that request before
it. It reads nothing else, so that a token's bits depend on no other row; and a row pays only for the processors that
its request needs. A further sampling parameter is a field of SamplingParams, a field of the HTTP body, and a processor
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from isotherm.cluster.engine.sequence import Chunk, Sampled, ScheduledSequence
from isotherm.cluster.messages.requests import SamplingParams, TokenLogprobs
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
    """Before `min_tokens` no token that ends the stream is drawn."""
    if row.index < row.params.min_tokens:
        logits_V[torch.tensor(row.params.stop_token_ids, device=logits_V.device)] = -math.inf


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
    def __init__(self, kernels: Kernels):
        self._kernels = kernels
        self._counts: WeakKeyDictionary[ScheduledSequence, TokenCounts] = WeakKeyDictionary()

    def sample(self, chunks: Sequence[Chunk], logits_NV: Tensor) -> list[Sampled]:
        """A token for each row that `chunks` sample, in order. logits_NV: float32, a row for each of them; changed
        where processors act."""
        rows = [row for chunk in chunks for row in self._rows(chunk)]
        if not rows:
            return []
        with torch.inference_mode():
            unchanged = self._process(rows, logits_NV)
            tokens = self._draw(rows, logits_NV)
            return [
                Sampled(token, None if (n := row.params.logprobs) is None else token_logprobs(logits_V, token, n))
                for row, token, logits_V in zip(rows, tokens, unchanged, strict=True)
            ]

    def _process(self, rows: Sequence[Row], logits_NV: Tensor) -> list[Tensor]:
        """Each row as it was before, where its log-probabilities are asked for."""
        unchanged = list(logits_NV)
        for i, row in enumerate(rows):
            chain = [act for needs, act in PROCESSORS if needs(row.params)]
            if chain and row.params.logprobs is not None:
                unchanged[i] = logits_NV[i].clone()
            for act in chain:
                act(row, logits_NV[i])
        return unchanged

    def _draw(self, rows: Sequence[Row], logits_NV: Tensor) -> list[int]:
        params = [row.params for row in rows]
        temperatures = [p.temperature if p.temperature >= LEAST_TEMPERATURE else 0.0 for p in params]
        return self._kernels.sample(
            logits_NV,
            torch.tensor(temperatures, dtype=torch.float64),
            torch.tensor([p.top_p for p in params], dtype=torch.float64),
            torch.tensor([p.top_k for p in params]),
            torch.tensor([p.seed for p in params]),
            torch.tensor([row.index for row in rows]),
        ).tolist()

    def _rows(self, chunk: Chunk) -> Iterator[Row]:
        sequence = chunk.sequence
        for after in range(chunk.samples):
            counts = partial(self._counts_of, sequence, chunk.draft[:after])
            yield Row(sequence.request.params, sequence.generated + after, counts)

    def _counts_of(self, sequence: ScheduledSequence, draft: tuple[int, ...]) -> TokenCounts:
        counts = self._counts.get(sequence)
        if counts is None:
            counts = self._counts[sequence] = TokenCounts(sequence.request.prompt)
        counts.take(sequence.tokens[sequence.prompt_length :])
        return counts.with_draft(draft) if draft else counts


def token_logprobs(logits_V: Tensor, token: int, top: int) -> TokenLogprobs:
    """Log-probabilities of one row of logits: the chosen token's and the `top` largest."""
    logprobs = logits_V.log_softmax(-1)
    values, ids = logprobs.topk(top)
    return TokenLogprobs(float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
