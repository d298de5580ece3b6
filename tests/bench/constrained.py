"""Streams held to a schema beside streams that are not, in one engine and one run, in turn: tokens per second of 16
streams, and the time to the first token of one. `python tests/bench/constrained.py [MODEL] [--rounds N]`."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from isotherm.actors.attention.engine import Engine
from isotherm.actors.local import local_engine
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import Constraint, GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.text.grammar import json_schema
from isotherm.kernels.select import select_kernels

STREAMS, TOKENS, PROMPT = 16, 96, 48
ROW = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "size": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ROW, "minItems": 500}  # longer than any stream here


def requests(count: int, round_: int, grammar: str | None) -> list[GenerationRequest]:
    constraint = None if grammar is None else Constraint(grammar)
    kind = "plain" if grammar is None else "held"
    return [
        GenerationRequest(
            f"{kind}-{round_}-{i}",
            tuple(100 + (7 * i + 31 * round_ + j) % 300 for j in range(PROMPT)),
            SamplingParams(TOKENS, temperature=1.0, seed=i, constraint=constraint),
        )
        for i in range(count)
    ]


def speed(engine: Engine, asked: list[GenerationRequest]) -> tuple[float, float]:
    """Tokens per second after the first ones, and seconds to the last first token."""
    begin = time.perf_counter()
    for request in asked:
        constraint = request.params.constraint
        if constraint is not None:
            assert engine.sampler.masks is not None and engine.sampler.masks.keep_if_ready(constraint)
        engine.scheduler.add(request)
    waiting = {request.id for request in asked}
    tokens, first = 0, 0.0
    while engine.scheduler.request_ids():
        deltas = engine.step()
        waiting -= {delta.request_id for delta in deltas}
        if first:
            tokens += sum(len(delta.token_ids) for delta in deltas)
        elif not waiting:
            first = time.perf_counter()
    return tokens / (time.perf_counter() - first), first - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=bundled_model())
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    kernels = select_kernels("auto", torch.bfloat16, None).kernels
    config = SchedulerConfig(16, 1024, 512, STREAMS, 512, prefix_cache=False)
    engine = local_engine(Checkpoint.open(args.model), kernels, config)
    grammar = json_schema(SCHEMA)
    ready: list[bool] = []
    if engine.prepare(requests(1, 0, grammar)[0], lambda: ready.append(True)):
        while not ready:
            time.sleep(0.01)
    plain, held = [], []
    for round_ in range(args.rounds + 2):
        for name, of in ((None, plain), (grammar, held)) if round_ % 2 else ((grammar, held), (None, plain)):
            many = speed(engine, requests(STREAMS, round_, name))[0]
            one = speed(engine, requests(1, round_, name))[1]
            if round_ >= 2:
                of.append((many, one))
    for name, of in (("plain", plain), ("held to a schema", held)):
        tokens = statistics.median(many for many, _ in of)
        print(
            f"{name}: {tokens:.0f} tokens/s, first token after {1e3 * statistics.median(one for _, one in of):.2f} ms"
        )
    ratios = [after[0] / before[0] for before, after in zip(plain, held, strict=True)]
    print(f"ratio, the median of {len(ratios)} pairs: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
