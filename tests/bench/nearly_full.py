"""A model that nearly fills this machine's memory, served by a whole cluster: how fast one stream is beside what the
memory allows, and what it is like when an expert group is killed under it.

python tests/bench/make_large.py glm-4.7-flash DIR --int4        # 18 GB
python tests/bench/nearly_full.py DIR [--groups 2] [--tokens 64] [--runs 3]

Fails where the stream has less than 70 % of the speed at which the memory could be read, or other tokens after the
loss than before it, or none."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
import yaml

from isotherm.cluster.cli.bench_kernels import stream_bandwidth
from isotherm.cluster.cli.own_cluster import OwnCluster
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.conversion import kept_bytes
from isotherm.cluster.model.tensors import Part
from isotherm.cluster.model.weight_choice import WeightChoice

ASKED = 0.7  # of what the memory gives
CODED = 0.75  # of the bytes of bf16 weights, as native kernels keep them
Token = tuple[str, float]


def token_bytes(checkpoint: Checkpoint, choice: WeightChoice) -> float:
    """Bytes of weights that one token of one stream reads."""
    config, total = checkpoint.config, 0.0
    for spec in checkpoint.weights():
        stored = sum(info.nbytes for info in checkpoint.tensors_of(spec.name, spec.quantisable).values())
        kept: float = stored
        if spec.quantisable:
            stored_as = checkpoint.format_of(spec.name)
            kept = kept_bytes(spec, choice, stored_as, stored)
            if kept == stored and checkpoint.tensors.get(spec.name) is not None:  # plain numbers
                kept *= CODED
        if spec.part is Part.ROUTED_EXPERTS:
            kept *= config.num_experts_per_tok / config.n_routed_experts
        total += 0 if spec.part is Part.EMBEDDING else kept
    return total


def stream(url: str, tokens: int, seen: Callable[[int], None] = lambda _: None) -> tuple[list[Token], list[float]]:
    """Tokens with their log-probabilities, and when each was there. `seen` is told how many there are."""
    out: list[Token] = []
    times: list[float] = []
    body = {"prompt": "The history of the world begins with", "max_tokens": tokens, "temperature": 0, "logprobs": 1}
    asked = {"model": "large", "stream": True, "ignore_eos": True} | body
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise SystemExit(f"after {len(out)} tokens: {event['error']}")
            logprobs = event["choices"][0]["logprobs"] if event["choices"] else None
            for token in (
                zip(*(logprobs[name] for name in ("tokens", "token_logprobs")), strict=True) if logprobs else ()
            ):
                out.append(token)
                times.append(time.perf_counter())
                seen(len(out))
    return out, times


def speed(times: list[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0])


def kill_group(url: str) -> None:
    workers = httpx.get(f"{url}/status", timeout=30).json()["workers"]
    group = next(worker for worker in workers if worker["role"] == "expert")
    os.kill(group["pid"], signal.SIGKILL)
    print(f"{group['id']} (process {group['pid']}, {group['weight_bytes'] / 1e9:.1f} GB) is killed")


def measure(url: str, args: argparse.Namespace, read: float) -> bool:
    """`read`: bytes of a token. What the memory gives is taken just before and just after: others use it too."""
    stream(url, 16)
    given = [stream_bandwidth()]
    runs = [stream(url, args.tokens) for _ in range(args.runs)]
    given.append(stream_bandwidth())
    before, speeds = runs[0][0], [speed(times) for _, times in runs]
    share = statistics.median(speeds) * read / statistics.mean(given) / 1e9
    print(f"the memory gave {given[0]:.1f} and {given[1]:.1f} GB/s to a reader of its own, before and after")
    print(f"one stream: {', '.join(f'{s:.1f}' for s in speeds)} tokens/s, {share:.0%} of what the memory allows")
    after, times = stream(url, args.tokens, lambda n: kill_group(url) if n == args.tokens // 3 else None)
    same = all(tokens == before for tokens in (after, *(tokens for tokens, _ in runs)))
    stall = max(b - a for a, b in pairwise(times))
    print(f"{len(after)} tokens, {'the same' if same else 'OTHERS'}; the longest pause was {stall:.1f} s")
    tokens, times = stream(url, args.tokens)
    print(f"afterwards {speed(times):.1f} tokens/s; {psutil.virtual_memory().available / 1e9:.1f} GB are free")
    return share >= ASKED and same and tokens == before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    manifest = {
        "model": str(args.model.resolve()),
        "served_name": "large",
        "experts": {"groups": args.groups, "spare_slots": 0},
        "weights": {"head": "int8"},
        "engine": {"max_model_len": 2048},
        "autoscaling": {"mode": "off"},  # there is no room for what moves
    }
    read = token_bytes(Checkpoint.open(args.model), WeightChoice(head="int8"))
    print(f"a token reads {read / 1e9:.2f} GB")
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "manifest.yaml").write_text(yaml.safe_dump(manifest))
        begin = time.perf_counter()
        with OwnCluster(str(path)) as cluster:
            print(f"ready after {time.perf_counter() - begin:.0f} s")
            well = measure(cluster.url, args, read)
    raise SystemExit(not well)


if __name__ == "__main__":
    main()
