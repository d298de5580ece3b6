"""Whether the time to a first token tells one tenant what another has asked.

python tests/bench/tenants.py [--pairs 200] [--prompt 600]

Each pair is two prompts of one length that the asking tenant has not asked before: one that another tenant has asked a
moment ago, and one that nobody has; which comes first is drawn. The differences of a pair's times are tested against
none by permutation of their signs. With caches by tenant there must be no difference (p > 0.05), and no cached token;
with a shared one the same test must find the difference, or it could find none at all."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time

import numpy as np
import torch

from isotherm.actors.local import local_engine
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.local.engine import LocalEngine
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.kernels.select import select_kernels

PERMUTATIONS = 20_000


async def first_token(engine: LocalEngine, name: str, prompt: tuple[int, ...], tenant: str) -> tuple[float, int]:
    """Seconds, and the prompt's tokens that were taken from the cache."""
    request = GenerationRequest(name, prompt, SamplingParams(1, 0.0), tenant=tenant)
    begin = time.perf_counter()
    async for delta in engine.generate(request):
        return time.perf_counter() - begin, delta.cached_tokens
    raise RuntimeError(f"{name} has ended without a token")


async def measure(pairs: int, length: int, tenants: tuple[str, str], seed: int) -> tuple[list[float], list[float], int]:
    """Seconds where somebody else had asked, and where nobody had; and cached tokens."""
    rng = random.Random(seed)
    checkpoint = Checkpoint.open(bundled_model())
    kernels = select_kernels("auto", torch.bfloat16).kernels
    blocks = 4 * -(-length // 16)  # soon full, so that all that is measured evicts as much
    scheduler = SchedulerConfig(16, blocks, length, 1, length + 16)
    engine = LocalEngine(local_engine(checkpoint, kernels, scheduler), checkpoint.config.vocab_size, "bench", "")
    known: list[float] = []
    unknown: list[float] = []
    cached = 0

    def prompt() -> tuple[int, ...]:
        return tuple(rng.randrange(checkpoint.config.vocab_size) for _ in range(length))

    other, mine = tenants
    try:
        for i in range(-5, pairs):
            asked, fresh = prompt(), prompt()
            await first_token(engine, f"other {i}", asked, other)
            both = [(asked, known), (fresh, unknown)]
            rng.shuffle(both)
            for which, (ids, times) in enumerate(both):
                seconds, found = await first_token(engine, f"mine {i} {which}", ids, mine)
                if i >= 0:
                    times.append(seconds)
                    cached += found
    finally:
        engine.close()
    return known, unknown, cached


def p_value(differences: list[float], seed: int = 0) -> float:
    """Of the mean being as far from 0 as this by chance: two-sided, by permutation of signs."""
    values = np.array(differences)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(PERMUTATIONS, len(values)))
    means = np.abs(signs @ values)
    return float((np.sum(means >= abs(values.sum())) + 1) / (PERMUTATIONS + 1))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    good = True
    for name, tenants, differs in (("by tenant", ("a", "b"), False), ("shared", ("", ""), True)):
        known, unknown, cached = asyncio.run(measure(options.pairs, options.prompt, tenants, options.seed))
        p = p_value([a - b for a, b in zip(known, unknown, strict=True)])
        asked, fresh = (statistics.median(seconds) * 1e3 for seconds in (known, unknown))
        print(
            f"{name:>9}: {options.pairs} pairs, first token after {asked:.2f} ms where another had asked, "
            f"{fresh:.2f} ms where nobody had; p = {p:.4f}; {cached} cached tokens",
            flush=True,
        )
        good &= (p < 0.001 and cached > 0) if differs else (p > 0.05 and cached == 0)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
