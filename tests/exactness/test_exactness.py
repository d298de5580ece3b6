"""Promise 1: a stream is a function of (prompt, sampling parameters, seed) alone. Everything around it is shuffled, and
the logits of every sampled token are compared bit for bit with the request's lone run.

`ISOTHERM_EXACTNESS_CASES` sets how many (request, circumstances) cases are drawn; `make exactness` asks for 10,000.
"""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass, replace

import pytest
import tokenizers
import torch
from deepseek_checkpoints import make_checkpoint
from drafters import Guesser, always
from tokenizers import decoders, models, pre_tokenizers

from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.exchange import ExpertExchange
from isotherm.actors.attention.masks import Masks
from isotherm.actors.attention.sampling import Sampler
from isotherm.actors.attention.speculation import speculation_of
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.links.in_process import InProcessLink
from isotherm.actors.models.deepseek_v3 import DeepseekV3Model
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.sequence import ScheduledSequence
from isotherm.cluster.messages.requests import Constraint, GenerationRequest, SamplingParams, TokenLogprobs
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.cluster.placement.table import Placement
from isotherm.cluster.text.grammar import json_schema, regex
from isotherm.cluster.text.grammar_vocabulary import GrammarVocabulary
from isotherm.kernels.formats.registry import quantised
from isotherm.kernels.formats.stored import StoredWeight
from isotherm.kernels.native.backend import NativeKernels

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("ISOTHERM_EXACTNESS_CASES", "400"))
VOCABULARY, EOS = 300, 256
MODELS: dict[str, dict] = {
    "bf16": {"dtype": "bfloat16"},
    "fp8": {"fp8": True},
    "int4": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
    "fp8-cache": {"dtype": "bfloat16"},
}


class Int4Reader(WeightReader):
    """Every projection in four bits, but the head, which has eight."""

    def stored(self, name: str) -> StoredWeight:
        return quantised("int8" if name == "lm_head.weight" else "int4", super().stored(name))


@dataclass(frozen=True)
class Seen:
    """What one request got: its tokens, a digest of the logits that each was sampled from, and what scores its
    prompt."""

    tokens: tuple[int, ...]
    logits: tuple[bytes, ...]
    scores: tuple[TokenLogprobs, ...]


def byte_tokenizer() -> str:
    """A tokenizer.json: every byte, and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    assert backend.token_to_id("<eos>") == EOS
    return backend.to_str()


GRAMMARS = GrammarVocabulary(byte_tokenizer, EOS, VOCABULARY)
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": -99, "maximum": 999}}
CONSTRAINTS = [
    Constraint(json_schema(NUMBERS)),
    Constraint(regex("[a-f]{3,}( [x-z0-9]+)*")),
    Constraint('start: ("ab" | "abc" | pair)+\npair: "(" start ")"\n'),
    Constraint(json_schema({"type": "object"}), after=(7, 8, 9, 10, 11, 12, 13, 14)),
]


class Recorder(Sampler):
    """Keeps digests of the logits it samples from: of a row after a wrong draft only until the right one comes."""

    def __init__(self, kernels):
        super().__init__(kernels, Masks(lambda: GRAMMARS))
        self.digests: dict[tuple[str, int], bytes] = {}

    def sample(self, chunks, logits_NV):
        rows = iter(logits_NV)
        for chunk in chunks:
            for after in range(chunk.samples):
                key = (chunk.sequence.request.id, chunk.sequence.generated + after)
                self.digests[key] = hashlib.blake2b(next(rows).numpy().tobytes(), digest_size=16).digest()
        return super().sample(chunks, logits_NV)


class Guesses(Guesser):
    """Drafts of what the lone run gave, with mistakes."""

    def __init__(self, world: World, rng: random.Random):
        self.world, self.rng, self.right, self.wrong = world, rng, rng.random(), 0

    def guess(self, sequence: ScheduledSequence, most: int) -> list[int]:
        known = self.world.alone(replace(sequence.request, generated=(), scored=0, accepted=False)).tokens[
            sequence.generated :
        ]
        guessed = known[: self.rng.randint(0, 5)]
        return [t if self.rng.random() < self.right else self.rng.randrange(VOCABULARY) for t in guessed]


class World:
    """A checkpoint loaded once per thread count, with a full set of experts that any placement can use."""

    def __init__(self, path, dtype, reads: type[WeightReader], kv_cache_dtype: KvCacheDtype):
        self.checkpoint = Checkpoint.open(path).with_mtp()
        self.config = self.checkpoint.config
        self.models = {}
        self.workers = {}
        for threads in (1, 2, 3):
            kernels = NativeKernels(dtype, threads=threads)
            with reads(self.checkpoint) as reader:
                self.models[threads] = DeepseekV3Model(self.config, kernels, reader, 512, kv_cache_dtype=kv_cache_dtype)
                every = [(layer, e) for layer in self.config.moe_layers for e in range(self.config.n_routed_experts)]
                self.workers[threads] = [ExpertWorker(self.config, kernels, len(every)) for _ in range(3)]
                for worker in self.workers[threads]:
                    worker.load(reader, every)
        self.lone: dict[GenerationRequest, Seen] = {}

    def engine(
        self,
        threads: int,
        scheduler: SchedulerConfig,
        placement: Placement,
        speculation: str = "off",
        rng: random.Random | None = None,
    ) -> Engine:
        links = {f"g{i}": InProcessLink(worker.compute) for i, worker in enumerate(self.workers[threads])}
        model = self.models[threads]
        sampler = Recorder(model.kernels)
        engine = Engine(model, ExpertExchange(model.kernels, placement, links), scheduler, sampler=sampler)
        if speculation == "guesses":
            engine.speculation = always(Guesses(self, rng or random.Random(0)))
        else:
            engine.speculation = speculation_of(
                speculation, 4, engine, self.config.n_routed_experts, self.config.num_experts_per_tok
            )
            if engine.speculation is not None and rng is not None and rng.random() < 0.7:
                engine.speculation.lengths = None  # else it would find that nothing can be gained with these
        return engine

    def placement(self, rng: random.Random, groups: int) -> Placement:
        names = [f"g{i}" for i in range(groups)]

        def holders() -> tuple[str, ...]:
            return tuple(rng.sample(names, rng.randint(1, groups)))

        experts, layers = range(self.config.n_routed_experts), self.config.moe_layers
        return Placement(1, layers, tuple(tuple(holders() for _ in experts) for _ in layers))

    def alone(self, request: GenerationRequest) -> Seen:
        if request not in self.lone:
            engine = self.engine(
                1, SchedulerConfig(16, 32, 512, 1, 512, prefix_cache=False), self.placement(random.Random(0), 1)
            )
            self.lone[request] = play(engine, [(0, request)], random.Random(0), trouble=False)[request.id]
        return self.lone[request]


def play(
    engine: Engine, arrivals: list[tuple[int, GenerationRequest]], rng: random.Random, trouble: bool
) -> dict[str, Seen]:
    """Run to the end, requests coming at the given steps; with `trouble`, some are preempted on the way."""
    tokens: dict[str, list[int]] = {request.id: list(request.generated) for _, request in arrivals}
    scores: dict[str, list[TokenLogprobs]] = {request.id: [] for _, request in arrivals}
    scored = {request.id: request.scored for _, request in arrivals}
    arrivals, step = sorted(arrivals, key=lambda a: a[0]), 0
    while arrivals or len(engine.scheduler):
        while arrivals and arrivals[0][0] <= step:
            engine.scheduler.add(arrivals.pop(0)[1])
        if trouble and engine.scheduler.running and rng.random() < 0.08:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running).request.id)
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
            if delta.prompt is not None:
                assert delta.prompt.start == 1 + scored[delta.request_id] + len(scores[delta.request_id])
                scores[delta.request_id] += delta.prompt.tokens
        step += 1
    return {
        name: Seen(
            tuple(got), tuple(engine.sampler.digests.get((name, i), b"") for i in range(len(got))), tuple(scores[name])
        )
        for name, got in tokens.items()
    }


@pytest.fixture(scope="module", params=MODELS)
def world(request, tmp_path_factory):
    overrides = {"vocab_size": VOCABULARY, "attention_bias": True}
    path = make_checkpoint(tmp_path_factory.mktemp(request.param), overrides, seed=3, mtp=True, **MODELS[request.param])
    dtype = torch.float32 if request.param == "float32" else torch.bfloat16
    reads = Int4Reader if request.param == "int4" else WeightReader
    return World(path, dtype, reads, "fp8" if request.param == "fp8-cache" else "auto")


def pool() -> list[GenerationRequest]:
    """Requests with shared beginnings, of many lengths, greedy and sampled."""
    rng = random.Random(11)
    stem = [rng.randrange(VOCABULARY) for _ in range(120)]
    out = []
    for i in range(30):
        prompt = stem[: rng.choice([0, 5, 16, 31, 32, 64, 100])] + [
            rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))
        ]
        temperature = 0.0 if i % 2 else rng.choice([0.5, 1.0, 1.5])
        processed = {
            "min_p": rng.choice([0.0, 0.05]),
            "presence_penalty": rng.choice([0.0, 0.5]),
            "frequency_penalty": rng.choice([0.0, 0.3]),
            "repetition_penalty": rng.choice([1.0, 1.2]),
            "bad_words": rng.choice([(), tuple((rng.randrange(VOCABULARY),) for _ in range(40))]),
            "max_thinking_tokens": rng.choice([None, 0, 5]),
            "thought_begin": rng.choice([(), (rng.randrange(VOCABULARY),)]),
            "thought_end": rng.choice([(9,), (9, 4, 9)]),
            "logit_bias": rng.choice([(), ((rng.randrange(VOCABULARY), 3.0), (rng.randrange(VOCABULARY), -100.0))]),
        }
        cuts = rng.choice([1.0, 0.9]), rng.choice([0, 40])
        held = {"constraint": CONSTRAINTS[i // 4 % 4], "stop_token_ids": (EOS,)} if i % 4 == 0 else {}
        params = SamplingParams(
            0 if i == 7 else rng.randint(1, 24),
            temperature,
            *cuts,
            **{**(processed if i % 3 else {}), **held},
            seed=i,
            prompt_logprobs=2 if i % 4 == 3 else None,
        )
        out.append(GenerationRequest(f"r{i}", tuple(prompt), params))
    # Siblings of some: one prompt, and other seeds.
    for i in (1, 3, 5):
        families = replace(out[i], family=f"f{i}"), replace(out[i].params, seed=100 + i, prompt_logprobs=None)
        out[i] = families[0]
        out.append(replace(families[0], id=f"s{i}", params=families[1]))
    return out


def test_nothing_around_a_request_changes_its_bits(world):
    """Batch, arrival, chunking, block size, prefix cache, preemption, cache size, placement, copies, threads, drafts
    right and wrong, and a resumption half-way."""
    rng = random.Random(7)
    requests = pool()
    done = rounds = 0
    while done < CASES // len(MODELS):
        rounds += 1
        chosen = rng.sample(requests, rng.randint(1, 6))
        size = rng.choice([4, 8, 16])
        longest = max(len(r.prompt) + r.params.max_tokens for r in chosen)
        scheduler = SchedulerConfig(
            block_size=size,
            blocks=-(-longest // size) + rng.choice([0, 2, 10, 100]),
            max_batch_tokens=rng.choice([3, 7, 16, 64, 512]),
            max_sequences=rng.choice([1, 2, 8]),
            max_model_len=longest,
            prefix_cache=rng.random() < 0.7,
        )
        kind = rng.choice(["off", "guesses", "ngram", "mtp"])
        engine = world.engine(rng.choice([1, 2, 3]), scheduler, world.placement(rng, rng.randint(1, 3)), kind, rng)
        arrivals = []
        for request in chosen:
            expected = world.alone(request)
            if rng.random() < 0.3 and expected.scores:
                request = replace(request, scored=rng.randrange(len(expected.scores) + 1))
            if rng.random() < 0.3 and len(expected.tokens) > 1:
                generated = expected.tokens[: rng.randrange(1, len(expected.tokens))]
                request = replace(request, generated=generated, scored=len(expected.scores))
            arrivals.append((rng.randint(0, 12), request))
        for _ in range(rng.choice([1, 2])):  # the second time over a warm prefix cache
            got = play(engine, list(arrivals), rng, trouble=True)
            for _, request in arrivals:
                expected, seen, begin = (
                    world.alone(replace(request, generated=(), scored=0)),
                    got[request.id],
                    len(request.generated),
                )
                assert seen.tokens == expected.tokens, (rounds, request.id, scheduler)
                assert seen.scores == expected.scores[request.scored :], (rounds, request.id, scheduler)
                assert seen.logits[begin:] == expected.logits[begin:], (rounds, request.id, scheduler)
                done += 1
            engine.sampler.digests.clear()
    print(f"{done} cases in {rounds} rounds, 0 differences")
