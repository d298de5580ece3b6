"""Speculation, measured: whether tokens stay what they are, and how fast they come, with and without it in turn.

    python tests/bench/mtp.py [--model tiny] [--requests 1000] [--runs 31] [--kind auto] [--streams 1,8,32]
        [--skip-speed] [--skip-served] [--cpu-time]

1. Tokens (and log-probabilities) of many requests, greedy and sampled, with schemas, stop tokens, penalties, biases,
   thoughts that are ended and several choices, in a cache too small for all, so that some are preempted: the same with
   and without. (Stop strings are the front door's: tests/cluster/api/test_tiny_drafts.py.)
2. Speed on the model's own kind of text, decoded by 1, 8 and 32 streams, ÷ that without; and through HTTP, by one
   stream of `isotherm serve`. In a run both sides answer the same prompts, each some tokens further in turn, since the
   machine's speed changes within a second.
3. The same for random weights, where no draft is right.

Each is printed with what it has to be; the exit status is 1 where one of them is not. Speeds on its own text have goals
for the bundled model alone. --cpu-time leaves out what is served, for other processes do the work there."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from isotherm.actors.attention.engine import Engine
from isotherm.actors.local import local_engine, run
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import Constraint, GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import resolve_model
from isotherm.cluster.text.grammar import json_schema, regex
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.kernels.select import select_kernels

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
from deepseek_checkpoints import make_checkpoint
from served import Served

Clock = Callable[[], float]
Prompts = list[tuple[int, ...]]
Piece = tuple[int, float]  # tokens, and the seconds that they took
Side = Callable[[Prompts], Iterator[Piece]]
# By the number of streams: the speed with drafts, ÷ that without, that there is to be at least
OWN_TEXT, RANDOM_WEIGHTS, SERVED = {1: 1.5, 32: 0.98}, {1: 0.98, 8: 0.98, 32: 0.98}, {1: 1.3}
TOKENS = 160  # of each stream that is timed
PIECE = 32  # tokens of each stream, after which it is the other side's turn
SERVED_STREAMS = 4  # that are timed one after another in a run
ASKED = (
    "Tell me a story about a {}.", "What is {n} + {m}?", "Count from 1 to {n}.", "How do you spell {}?",
    "What day comes after Monday?", "Write a short letter about a {}.",
)  # fmt: skip
THINGS = ("fox", "river", "boat", "dog", "garden", "mountain", "bridge", "lamp", "horse", "village")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}
GRAMMARS = (json_schema(SCHEMA), regex("[a-z ]{5,40}"), 'start: ("yes" | "no" | /[0-9]{1,4}/)')


# --- what has to be -------------------------------------------------------------------------------


class Goal(NamedTuple):
    """Something that was looked at. `missed`: why it is not what it has to be; empty where it is."""

    what: str
    missed: str


def speed_goal(what: str, ratio: float, least: float | None) -> Goal:
    """`least`: None where any speed will do."""
    if least is None:
        return Goal(f"{what}: × {ratio:.3f}", "")
    return Goal(f"{what}: × {ratio:.3f}, at least {least:.2f}", "too slow" if ratio < least else "")


def token_goal(what: str, differ: Sequence[str], failed: str, right: int, preemptions: int) -> Goal:
    """Tokens that are the same show nothing where no draft was right, and little where no stream gave way."""
    missed = [f"{len(differ)} differ, as {', '.join(differ[:5])}"] if differ else []
    missed += [failed] if failed else []
    missed += [] if right else ["no draft was right"]
    missed += [] if preemptions else ["no stream gave way: ask for more --requests"]
    return Goal(what, "; ".join(missed))


def status_of(goals: Sequence[Goal]) -> int:
    """The exit status; says how each goal came out."""
    for goal in goals:
        print(f"{'MISSED' if goal.missed else 'passed'}  {goal.what}{f': {goal.missed}' if goal.missed else ''}")
    return int(any(goal.missed for goal in goals))


# --- tokens ---------------------------------------------------------------------------------------


def engine_of(path: Path, kind: str, config: SchedulerConfig, clock: Clock = time.perf_counter) -> Engine:
    kernels = select_kernels("auto", torch.bfloat16, 1 if clock is time.thread_time else None).kernels
    engine = local_engine(Checkpoint.open(path), kernels, config, speculation=kind)
    if engine.speculation is not None:
        engine.speculation.clock = clock
    return engine


def requests_of(tokenizer: Tokenizer, count: int) -> list[GenerationRequest]:
    rng, out = random.Random(3), []
    while len(out) < count:
        text = rng.choice(ASKED).format(rng.choice(THINGS), n=rng.randint(2, 40), m=rng.randint(2, 40))
        held = Constraint(rng.choice(GRAMMARS)) if rng.random() < 0.25 else None
        thinks = held is None and rng.random() < 0.2
        asked = [{"role": "user", "content": text}]
        prompt = tuple(tokenizer.encode_chat(asked, template_kwargs={"thinking": thinks}).ids)
        params = params_of(tokenizer, rng, held, thinks, len(out))
        name, choices = f"r{len(out)}", rng.choice([1, 1, 1, 3])
        for choice in range(min(choices, count - len(out))):
            family = name if choices > 1 else ""
            seeded = SamplingParams(**{**vars(params), "seed": params.seed + 1000 * choice})
            out.append(GenerationRequest(f"{name}-{choice}", prompt, seeded, family=family))
    return out


def params_of(
    tokenizer: Tokenizer, rng: random.Random, held: Constraint | None, thinks: bool, seed: int
) -> SamplingParams:
    eos = tuple(tokenizer.eos_token_ids)
    stops = eos if held is not None or rng.random() < 0.5 else (*eos, rng.randrange(tokenizer.vocab_size))
    more: dict[str, Any] = {}
    if rng.random() < 0.2:
        liked, never = rng.sample(range(tokenizer.vocab_size), 2)
        more["logit_bias"] = ((liked, 3.0), (never, -100.0))
    if thinks:  # the prompt has begun the thought
        end = tuple(tokenizer.encode("</think>", add_special_tokens=False))
        more |= {"thought_end": end, "max_thinking_tokens": rng.choice([3, 10, 40])}
    return SamplingParams(
        rng.randint(1, 60),
        rng.choice([0.0, 0.0, 0.7, 1.2]),
        rng.choice([1.0, 0.9]),
        rng.choice([0, 40]),
        seed=seed,
        stop_token_ids=stops,
        constraint=held,
        logprobs=rng.choice([None, None, 2]),
        presence_penalty=rng.choice([0.0, 0.0, 0.8]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.6]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.15]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        min_tokens=0 if held is not None else rng.choice([0, 0, 8]),
        bad_words=rng.choice([(), ((rng.randrange(tokenizer.vocab_size),),)]),
        **more,
    )


def outputs(engine: Engine, asked: list[GenerationRequest]) -> dict[str, list[object]]:
    """By request: its tokens in order, then their log-probabilities, then why it ended, however a step cut them."""
    tokens: dict[str, list[object]] = {request.id: [] for request in asked}
    others: dict[str, list[object]] = {request.id: [] for request in asked}
    for delta in run(engine, asked):
        tokens[delta.request_id] += delta.token_ids
        others[delta.request_id] += delta.logprobs
        if delta.finish_reason is not None:
            others[delta.request_id].append(delta.finish_reason)
    return {name: [*got, *others[name]] for name, got in tokens.items()}


def same_tokens(path: Path, kind: str, count: int) -> Goal:
    config = SchedulerConfig(16, 64, 256, 48, 256)
    asked = requests_of(Tokenizer.load(path), count)
    expected = outputs(engine_of(path, "off", config), asked)
    speculating = engine_of(path, kind, config)
    assert speculating.speculation is not None
    speculating.speculation.lengths = None  # as many drafts as there can be
    got = outputs(speculating, asked)
    differ = [name for name, tokens in expected.items() if got[name] != tokens]
    meter, preemptions = speculating.speculation.meter(), speculating.scheduler.preemptions
    right = sum(meter.accepted)
    what = f"tokens with {kind}: {len(asked)} requests, {meter.drafted} drafts, {right} right, {preemptions} gave way"
    print(f"  {what}")
    return token_goal(what, differ, speculating.speculation.stopped, right, preemptions)


# --- speed ----------------------------------------------------------------------------------------


def decoded(engine: Engine, prompts: Prompts, clock: Clock) -> Iterator[Piece]:
    """PIECE tokens of each stream at a time, while all of them decode; not their first two steps."""
    for i, prompt in enumerate(prompts):
        engine.scheduler.add(GenerationRequest(f"s{i}", prompt, SamplingParams(TOKENS, temperature=0.0)))
    steps = tokens = 0
    seconds = 0.0
    while len(engine.scheduler):
        begin = clock()
        deltas = engine.step()
        took = clock() - begin
        steps += len(deltas) == len(prompts)
        if steps <= 2 or len(deltas) < len(prompts):
            continue
        tokens, seconds = tokens + sum(len(delta.token_ids) for delta in deltas), seconds + took
        if tokens >= PIECE * len(prompts):
            yield tokens, seconds
            tokens, seconds = 0, 0.0
    if tokens:
        yield tokens, seconds


def own_prompts(tokenizer: Tokenizer, rng: random.Random, count: int) -> Prompts:
    texts = [
        f"Tell me a long story about a {rng.choice(THINGS)} and a {rng.choice(THINGS)}." for _ in range(count)
    ]  # fmt: skip
    return [tuple(tokenizer.encode_chat([{"role": "user", "content": text}]).ids) for text in texts]


def random_prompts(rng: random.Random, count: int) -> Prompts:
    return [tuple(rng.randrange(500) for _ in range(32)) for _ in range(count)]


def in_turn(sides: Mapping[str, Side], asked: Sequence[Prompts]) -> float:
    """Both sides with the same prompts, piece by piece in turn, again and again; the first time is not counted. The
    second's speed ÷ the first's, the median."""
    (plain, slow), (drafting, fast) = sides.items()
    figures = [both_speeds(slow(prompts), fast(prompts)) for prompts in asked][1:]
    ratios = [b / a for a, b in figures]
    before, after = (statistics.median(side) for side in zip(*figures, strict=True))
    print(f"  {plain} {before:.0f} → {drafting} {after:.0f} tokens/s, × {min(ratios):.2f} to {max(ratios):.2f}")
    return statistics.median(ratios)


def both_speeds(*sides: Iterator[Piece]) -> list[float]:
    """Tokens per second of each."""
    pieces: list[list[Piece]] = [[] for _ in sides]
    for turn in zip_longest(*sides):
        for mine, piece in zip(pieces, turn, strict=True):
            mine += [piece] if piece is not None else []
    return [sum(tokens for tokens, _ in mine) / sum(seconds for _, seconds in mine) for mine in pieces]


def offline_goals(
    path: Path, what: str, kind: str, options: argparse.Namespace, own_text: bool, least: Mapping[int, float]
) -> list[Goal]:
    clock = time.thread_time if options.cpu_time else time.perf_counter
    config = SchedulerConfig(16, 1024, 512, 32, 512, prefix_cache=False)
    engines = {name: engine_of(path, name, config, clock) for name in ("off", kind)}
    sides = {name: partial(decoded, one, clock=clock) for name, one in engines.items()}
    speculation = engines[kind].speculation
    assert speculation is not None
    tokenizer = Tokenizer.load(path) if own_text else None
    rng, goals = random.Random(5), []
    for streams in (int(part) for part in options.streams.split(",")):
        prompts = [
            random_prompts(rng, streams) if tokenizer is None else own_prompts(tokenizer, rng, streams)
            for _ in range(options.runs + 1)
        ]
        ratio = in_turn(sides, prompts)
        print(f"  {speculation.meter().why}")
        goals.append(speed_goal(f"{what}, {kind}, {streams} streams", ratio, least.get(streams)))
    return goals


def random_goals(options: argparse.Namespace) -> list[Goal]:
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            "vocab_size": 1280, "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1024,
            "moe_intermediate_size": 256, "n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 4,
            "topk_group": 2, "max_position_embeddings": 1024,
        }  # fmt: skip
        path = make_checkpoint(Path(folder), sizes, fp8=True, mtp=True)
        return [
            goal
            for kind in ("mtp", "ngram")
            for goal in offline_goals(path, "random weights", kind, options, False, RANDOM_WEIGHTS)
        ]


def served(client: httpx.Client, prompts: Prompts) -> Iterator[Piece]:
    """One stream after the other, from its first piece on."""
    for prompt in prompts:
        body = {"model": "bench", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
        first = None
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            if response.status_code != 200:
                raise RuntimeError(response.read().decode())
            for line in response.iter_lines():
                if line.startswith("data: {") and first is None:
                    first = time.perf_counter()
        assert first is not None
        yield TOKENS - 1, time.perf_counter() - first


def served_goal(path: Path, kind: str, runs: int, least: Mapping[int, float]) -> Goal:
    """Two clusters, of which one idles while the other is measured."""
    manifest = {"model": str(path), "served_name": "bench"}
    rng, tokenizer = random.Random(5), Tokenizer.load(path)
    with (
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as other,
        Served(manifest, Path(one)) as plain,
        Served(manifest | {"speculation": {"kind": kind}}, Path(other)) as drafting,
        httpx.Client(base_url=plain.url, timeout=120) as slow,
        httpx.Client(base_url=drafting.url, timeout=120) as fast,
    ):
        sides = {"off": partial(served, slow), kind: partial(served, fast)}
        ratio = in_turn(sides, [own_prompts(tokenizer, rng, SERVED_STREAMS) for _ in range(runs + 1)])
        (shard,) = (w for w in drafting.status()["workers"] if w["role"] == "attention")
        print(f"  {shard['speculation']['why']}")
    return speed_goal(f"own text through HTTP, {kind}, 1 stream", ratio, least.get(1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--kind", default="auto", choices=["auto", "mtp", "ngram"])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--skip-served", action="store_true")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its CPU time: for a busy machine")
    options = parser.parse_args()
    path, bundled = resolve_model(options.model), options.model == "tiny"
    goals = [same_tokens(path, kind, options.requests) for kind in dict.fromkeys((options.kind, "ngram"))]
    if not options.skip_speed:
        goals += offline_goals(path, "own text", options.kind, options, True, OWN_TEXT if bundled else {})
        if not options.skip_served and not options.cpu_time:
            goals.append(served_goal(path, options.kind, options.runs, SERVED if bundled else {}))
        goals += random_goals(options)
    return status_of(goals)


if __name__ == "__main__":
    sys.exit(main())
