"""Speculation, measured: whether tokens stay what they are, and how fast they come, with and without it in turn.

    python tests/bench/mtp.py [--model tiny] [--requests 1000] [--runs 7] [--kind auto] [--streams 1,8,32]
        [--skip-speed] [--cpu-time]

1. Tokens (and log-probabilities) of many requests, greedy and sampled, with schemas, stops, penalties and several
   choices, in a cache too small for all, so that some are preempted: the same with and without.
2. Speed on the model's own kind of text, decoded by 1, 8 and 32 streams, ÷ that without, runs in turn.
3. The same for random weights, where no draft is right.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from deepseek_checkpoints import make_checkpoint

Clock = Callable[[], float]
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
        prompt = tuple(tokenizer.encode_chat([{"role": "user", "content": text}]).ids)
        eos = tuple(tokenizer.eos_token_ids)
        held = Constraint(rng.choice(GRAMMARS)) if rng.random() < 0.25 else None
        stops = eos if held is not None or rng.random() < 0.5 else (*eos, rng.randrange(tokenizer.vocab_size))
        params = SamplingParams(
            rng.randint(1, 60),
            rng.choice([0.0, 0.0, 0.7, 1.2]),
            rng.choice([1.0, 0.9]),
            rng.choice([0, 40]),
            seed=len(out),
            stop_token_ids=stops,
            constraint=held,
            logprobs=rng.choice([None, None, 2]),
            presence_penalty=rng.choice([0.0, 0.0, 0.8]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.15]),
            min_tokens=0 if held is not None else rng.choice([0, 0, 8]),
            bad_words=rng.choice([(), ((rng.randrange(tokenizer.vocab_size),),)]),
        )
        name, choices = f"r{len(out)}", rng.choice([1, 1, 1, 3])
        for choice in range(min(choices, count - len(out))):
            family = name if choices > 1 else ""
            seeded = SamplingParams(**{**vars(params), "seed": params.seed + 1000 * choice})
            out.append(GenerationRequest(f"{name}-{choice}", prompt, seeded, family=family))
    return out


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


def same_tokens(path: Path, kind: str, count: int) -> bool:
    config = SchedulerConfig(16, 64, 256, 48, 256)
    asked = requests_of(Tokenizer.load(path), count)
    expected = outputs(engine_of(path, "off", config), asked)
    speculating = engine_of(path, kind, config)
    assert speculating.speculation is not None
    speculating.speculation.lengths = None  # as many drafts as there can be
    got = outputs(speculating, asked)
    failed = speculating.speculation.stopped
    wrong = [name for name, tokens in expected.items() if got[name] != tokens]
    meter = speculating.speculation.meter()
    print(
        f"{kind}: {len(asked)} requests, {len(wrong)} differ {wrong[:5]}; {meter.drafted} drafts, "
        f"{sum(meter.accepted)} right, {speculating.scheduler.preemptions} preemptions"
    )
    if failed:
        print(f"  {failed}")
    return not wrong and not failed


def speed(engine: Engine, prompts: list[tuple[int, ...]], tokens: int, clock: Clock) -> float:
    """Tokens per second while all streams decode; not their first two steps."""
    for i, prompt in enumerate(prompts):
        engine.scheduler.add(GenerationRequest(f"s{i}", prompt, SamplingParams(tokens, temperature=0.0)))
    steps = []
    while len(engine.scheduler):
        begin = clock()
        deltas = engine.step()
        if len(deltas) == len(prompts):
            steps.append((sum(len(delta.token_ids) for delta in deltas), clock() - begin))
    return sum(n for n, _ in steps[2:]) / sum(seconds for _, seconds in steps[2:])


def compare(path: Path, kind: str, runs: int, own_text: bool, clock: Clock, sizes: list[int]) -> None:
    config = SchedulerConfig(16, 1024, 512, 32, 512, prefix_cache=False)
    sides = {name: engine_of(path, name, config, clock) for name in ("off", kind)}
    speculation = sides[kind].speculation
    assert speculation is not None
    rng = random.Random(5)
    for streams in sizes:
        figures: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(runs + 1):
            if own_text:
                tokenizer = Tokenizer.load(path)
                texts = [
                    f"Tell me a long story about a {rng.choice(THINGS)} and a {rng.choice(THINGS)}."
                    for _ in range(streams)
                ]
                prompts = [tuple(tokenizer.encode_chat([{"role": "user", "content": text}]).ids) for text in texts]
            else:
                prompts = [tuple(rng.randrange(500) for _ in range(32)) for _ in range(streams)]
            for name, engine in sides.items():
                value = speed(engine, prompts, 160, clock)
                if number:  # the first is not counted
                    figures[name].append(value)
        ratios = [a / b for a, b in zip(figures[kind], figures["off"], strict=True)]
        low, middle = min(ratios), statistics.median(ratios)
        print(
            f"  {streams:2} streams: {statistics.median(figures['off']):.0f} → {statistics.median(figures[kind]):.0f} "
            f"tokens/s, × {middle:.2f} (least {low:.2f}); {speculation.meter().why}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--kind", default="auto", choices=["auto", "mtp", "ngram"])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, and its CPU time: for a busy machine")
    options = parser.parse_args()
    clock = time.thread_time if options.cpu_time else time.perf_counter
    streams = [int(part) for part in options.streams.split(",")]
    path = resolve_model(options.model)
    same = [same_tokens(path, kind, options.requests) for kind in dict.fromkeys((options.kind, "ngram"))]
    if not options.skip_speed:
        print(f"{options.model}, its own kind of text")
        compare(path, options.kind, options.runs, True, clock, streams)
        with tempfile.TemporaryDirectory() as folder:
            sizes = {
                "vocab_size": 1280, "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1024,
                "moe_intermediate_size": 256, "n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 4,
                "topk_group": 2, "max_position_embeddings": 1024,
            }  # fmt: skip
            random_path = make_checkpoint(Path(folder), sizes, fp8=True, mtp=True)
            for kind in ("mtp", "ngram"):
                print(f"random weights, {kind}")
                compare(random_path, kind, options.runs, False, clock, streams)
    sys.exit(not all(same))


if __name__ == "__main__":
    main()
