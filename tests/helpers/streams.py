"""Streams of the bundled model over HTTP, and what each request gets from an engine of its own."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from isotherm.actors.local import local_engine, run
from isotherm.actors.models.weights import parse_dtype
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.kernels.select import select_kernels

SUBJECTS = [
    "Count from 3 to {n}.",
    "What is {n} + 5?",
    "Spell the word house.",
    "Which day comes after Monday?",
    "Tell me a story about a fox.",
]


@dataclass
class Stream:
    """What a client saw. `error`: HTTP's status, or an error event's words; `cut`: how the connection failed, or fell
    silent; `done`: the stream ended with [DONE]. `first`: seconds to the first chunk; `gaps`: seconds between chunks.
    """

    text: str = ""
    error: str = ""
    cut: str = ""
    done: bool = False
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    fingerprints: set[str] = field(default_factory=set)  # of its chunks


class Workload:
    """Requests of mixed lengths, greedy and sampled: single questions,
    and long dialogues that share their beginnings."""

    def __init__(self, count: int, tokens: list[int], temperatures: tuple[float, ...] = (0.0, 1.0)):
        self.tokenizer = Tokenizer.load(bundled_model())
        rng = random.Random(5)
        self.requests = []
        for i in range(count):
            turns = [{"role": "user", "content": rng.choice(SUBJECTS).format(n=rng.randrange(10, 60))}]
            for _ in range(i % 4):
                said = {"role": "assistant", "content": "I see. " * rng.randrange(1, 8)}
                turns += [said, {"role": "user", "content": SUBJECTS[i % 5].format(n=i)}]
            prompt = self.tokenizer.encode_chat(turns).ids
            params = SamplingParams(tokens[i % len(tokens)], temperatures[i % len(temperatures)], seed=i)
            self.requests.append(GenerationRequest(f"alone-{i}", tuple(prompt), params))

    def alone(self, model: Path | None = None, dtype: str = "bfloat16") -> list[str]:
        """Each request's text from an engine of its own, in this process, with the bundled weights or others."""
        kernels = select_kernels("auto", parse_dtype(dtype)).kernels
        config = SchedulerConfig(16, 256, 512, 1, 4096, prefix_cache=False)
        engine = local_engine(Checkpoint.open(model or bundled_model()), kernels, config)
        texts = []
        for request in self.requests:
            stream = self.tokenizer.stream()
            tokens = [token for delta in run(engine, [request]) for token in delta.token_ids]
            texts.append(stream.push(tokens).text + stream.flush())
        return texts

    async def serve(self, url: str, silence: float = 200) -> list[Stream]:
        """All requests at once. `silence`: seconds without a word after which a stream is given up."""
        limits = httpx.Limits(max_connections=len(self.requests))
        async with httpx.AsyncClient(base_url=url, timeout=silence, limits=limits) as client:
            return await asyncio.gather(*(self._ask(client, request) for request in self.requests))

    async def _ask(self, client: httpx.AsyncClient, request: GenerationRequest) -> Stream:
        stream = Stream()
        try:
            await self._read(client, request, stream)
        except httpx.TransportError as error:
            stream.cut = repr(error)
        return stream

    async def _read(self, client: httpx.AsyncClient, request: GenerationRequest, stream: Stream) -> None:
        params = request.params
        body = {
            "model": "tiny",
            "prompt": request.prompt,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "seed": params.seed,
        }
        begin, last = time.perf_counter(), 0.0
        async with client.stream(
            "POST", "/v1/completions", json=body | {"ignore_eos": True, "stream": True}
        ) as response:
            if response.status_code != 200:
                stream.error = f"HTTP {response.status_code}"
                return
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    now, chunk = time.perf_counter(), json.loads(line[6:])
                    if last:
                        stream.gaps.append(now - last)
                    else:
                        stream.first = now - begin
                    last = now
                    if "error" in chunk:
                        stream.error = str(chunk["error"])
                    else:
                        stream.fingerprints.add(chunk["system_fingerprint"])
                        stream.text += chunk["choices"][0]["text"]
                elif line == "data: [DONE]":
                    stream.done = True
