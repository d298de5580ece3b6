"""One checkpoint beside its oracle: what engines of it have to give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hf_oracle import Oracle

from isotherm.actors.attention.engine import Engine
from isotherm.actors.local import local_engine
from isotherm.actors.models.step_batch import build_batch
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.sequence import Chunk, Form, ScheduledSequence
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.placement.table import Placement
from isotherm.kernels.ops import Kernels
from isotherm.kernels.reference import ReferenceKernels

PROMPT, OUTPUT = 200, 48
BLOCK_SIZE = 16
TOLERANCE = 1e-4  # of log-probabilities
# Tens of times what float32 rounding was seen to do.
TOKEN_MARGIN, ROUTER_MARGIN, INDEX_MARGIN = 5e-3, 2e-5, 5e-6


class Case:
    """One checkpoint with what the oracle says about it. `margins`: by how little any token, expert and position was
    chosen, which float32 rounding must not come near to."""

    def __init__(self, path: Path, seed: int, prompt: int = PROMPT, others: Sequence[int] = (61, 1, 96)):
        """`prompt` and `others`: lengths of prompts, drawn by `seed`."""
        self.checkpoint = Checkpoint.open(path)
        self.config = self.checkpoint.config
        self.kernels: Kernels = ReferenceKernels(torch.float32)
        generator = torch.Generator().manual_seed(1000 + seed)
        self.prompt = tuple(torch.randint(2, self.config.vocab_size, (prompt,), generator=generator).tolist())
        self.others = [
            tuple(torch.randint(2, self.config.vocab_size, (n,), generator=generator).tolist()) for n in others
        ]
        oracle = Oracle(path)
        self.logprobs = oracle.logprobs(self.prompt)
        self.rounding = oracle.rounding(self.prompt)
        self.tokens, self.rows, margin = oracle.greedy(self.prompt, OUTPUT)
        self.other_tokens = []
        for other in self.others:
            tokens, _, other_margin = oracle.greedy(other, OUTPUT)
            self.other_tokens.append(tokens)
            margin = min(margin, other_margin)
        self.margins = margin, oracle.router_margin, oracle.index_margin

    @property
    def close_call(self) -> str:
        """What was chosen by too little; empty where nothing was."""
        least = {"token": TOKEN_MARGIN, "expert": ROUTER_MARGIN, "position": INDEX_MARGIN}
        close = [
            f"{what} was chosen by a margin of only {margin:g}"
            for (what, limit), margin in zip(least.items(), self.margins, strict=True)
            if not margin > limit
        ]
        return " and ".join(close)

    def engine(
        self,
        *,
        blocks: int = 64,
        budget: int = 256,
        prefix_cache: bool = False,
        groups: int = 1,
        placement: Placement | None = None,
    ) -> Engine:
        """With a cache full of NaN, so that whatever is read before it was written shows."""
        config = SchedulerConfig(
            BLOCK_SIZE,
            blocks,
            budget,
            max_sequences=8,
            max_model_len=len(self.prompt) + OUTPUT + 8,
            prefix_cache=prefix_cache,
        )
        engine = local_engine(self.checkpoint, self.kernels, config, groups, placement)
        for layer in engine.cache:
            layer.fill_(torch.nan)
        return engine

    def request(self, name: str = "main", prompt: tuple[int, ...] | None = None, **fields: Any) -> GenerationRequest:
        return GenerationRequest(name, prompt or self.prompt, SamplingParams(OUTPUT, temperature=0.0), **fields)

    def other_requests(self) -> list[GenerationRequest]:
        return [self.request(f"other-{i}", prompt) for i, prompt in enumerate(self.others)]


def gather(deltas: Iterable[Delta], start: int = 0) -> dict[str, list[int]]:
    """Tokens by request; checks that deltas follow on each other from `start` and that only the last one finishes."""
    tokens: dict[str, list[int]] = {}
    finished = set()
    for delta in deltas:
        have = tokens.setdefault(delta.request_id, [])
        assert delta.start == start + len(have)
        assert delta.request_id not in finished
        have += delta.token_ids
        if delta.finish_reason is not None:
            assert delta.finish_reason is FinishReason.LENGTH
            finished.add(delta.request_id)
    assert finished == set(tokens)
    return tokens


def steps(engine: Engine) -> Iterator[list[Delta]]:
    while len(engine.scheduler):
        yield engine.step()


def forward_all(case: Case, forms: Sequence[tuple[Form, int, int]]) -> torch.Tensor:
    """Log-probabilities [positions, V] at every position of the prompt, computed by AttentionModel.forward in the given
    (form, start, count)s."""
    engine = case.engine()
    sequence = ScheduledSequence(
        case.request(), 0, list(case.prompt), blocks=list(range(17, 17 + -(-len(case.prompt) // BLOCK_SIZE)))
    )
    out = []
    for form, start, count in forms:
        batch = build_batch(
            [Chunk(sequence, start, count, form, sample=False)], BLOCK_SIZE, engine.model.cos, engine.model.sin
        )
        x = engine.model.forward(batch, engine.cache, engine.experts)
        out.append(engine.model.logits(x).log_softmax(-1))
    return torch.cat(out)
