"""Offline speed of the whole engine in one process: decode tokens/s at given batch sizes, prefill tokens/s at given
lengths."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from isotherm.actors.attention.engine import Engine
from isotherm.actors.local import local_engine
from isotherm.actors.models.weights import parse_dtype
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.kernels.select import select_kernels

PROMPT = 32  # tokens before a decode measurement


@dataclass(frozen=True)
class Figure:
    """One measurement. `runs` are tokens per second, one per run."""

    name: str
    size: int  # streams, or prompt tokens
    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def as_dict(self) -> JSON:
        return asdict(self) | {"median": self.median}


class EngineBench:
    """A loaded model that can be measured again and again, so that two sides can be taken in turn."""

    def __init__(
        self,
        path: Path,
        *,
        dtype: str,
        kernels: str,
        threads: int | None,
        most_streams: int,
        most_prompt: int,
        isa: str = "auto",
        device: str = "cpu",
        seed: int = 0,
        choice: WeightChoice | None = None,
        most_output: int = 125,
        speculation: str = "off",
        kv_cache_dtype: KvCacheDtype = "auto",
    ):
        checkpoint = Checkpoint.open(path)
        self.kernels = select_kernels(kernels, parse_dtype(dtype), threads, device, isa).kernels
        self._random = random.Random(seed)
        self._vocab = checkpoint.config.vocab_size
        reply = PROMPT + most_output + 3
        length = max(reply, most_prompt + 1)
        blocks = most_streams * -(-reply // 16) + -(-length // 16)
        config = SchedulerConfig(16, blocks, max(512, most_prompt), max(1, most_streams), length, prefix_cache=False)
        self.engine: Engine = local_engine(
            checkpoint, self.kernels, config, choice=choice, speculation=speculation, kv_cache_dtype=kv_cache_dtype
        )
        self._requests = 0

    def _add(self, prompt: int, output: int) -> None:
        self._requests += 1
        tokens = tuple(self._random.randrange(self._vocab) for _ in range(prompt))
        self.engine.scheduler.add(
            GenerationRequest(f"bench-{self._requests}", tokens, SamplingParams(output, temperature=0.0))
        )

    def decode(self, streams: int, tokens: int = 48) -> float:
        """Tokens per second of `streams` requests that all generate; their prompts and the first two steps are not
        counted."""
        for _ in range(streams):
            self._add(PROMPT, tokens + 3)
        steps = []  # (tokens, seconds)
        while len(self.engine.scheduler):
            begin = time.perf_counter()
            deltas = self.engine.step()
            if len(deltas) == streams:
                steps.append((sum(len(delta.token_ids) for delta in deltas), time.perf_counter() - begin))
        counted = steps[2:]
        return sum(tokens for tokens, _ in counted) / sum(seconds for _, seconds in counted)

    def prefill(self, prompt: int) -> float:
        """Prompt tokens per second of one request alone, to its first token."""
        self._add(prompt, 1)
        begin = time.perf_counter()
        while len(self.engine.scheduler):
            self.engine.step()
        return prompt / (time.perf_counter() - begin)

    def measure(self, batches: list[int], prompts: list[int], runs: int) -> list[Figure]:
        """Every size in turn, `runs` times, after one uncounted round."""
        results: dict[tuple[str, int], list[float]] = {}
        for run in range(runs + 1):
            for name, sizes, speed in ("decode", batches, self.decode), ("prefill", prompts, self.prefill):
                for size in sizes:
                    value = speed(size)
                    if run:
                        results.setdefault((name, size), []).append(value)
        return [Figure(name, size, tuple(values)) for (name, size), values in results.items()]
