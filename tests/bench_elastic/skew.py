"""Criterion 2: hot experts all on one of two groups; what the autoscaler makes of it, beside the same cluster with the
autoscaler off.

    python tests/bench_elastic/skew.py [--model DIR] [--seconds 60]

DIR: a checkpoint whose hot experts are all in the first half of the ids (shared/bench/make_checkpoint.py m DIR --skew
1.2 makes one). Without it a smaller one is made. The contiguous placement of the start then has the hot half on the
first group. Both clusters get the same traffic, one after the other; throughput is that of the second half of it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from served import Served
from skewed import skewed_checkpoint
from traffic import Sample, Traffic, between, random_prompts, spread, watch

from isotherm.cluster.model.registry import load_config

STREAMS, THRESHOLD, GAIN, LIMIT = 16, 1.15, 1.4, 30.0


def run(model: Path, mode: str, options: argparse.Namespace) -> list[Sample]:
    manifest = {
        "model": str(model),
        "served_name": "skewed",
        "attention": {"threads": options.attention_threads},
        "experts": {"groups": 2, "threads": 1},
        "autoscaling": {"mode": mode},
    }
    with tempfile.TemporaryDirectory() as folder, Served(manifest, Path(folder)) as served:
        prompts = random_prompts(load_config(model).vocab_size, 16)
        traffic = Traffic(served.url, "skewed", STREAMS, 256, prompts, options.temperature, not options.whole)

        async def measure() -> list[Sample]:
            async with traffic.flowing():
                return await watch(served.url, options.seconds)

        samples = asyncio.run(measure())
    if traffic.errors:
        raise RuntimeError(f"{len(traffic.errors)} requests failed: {traffic.errors[0]}")
    return samples


@dataclass(frozen=True)
class Half:
    """The second half of a run. Times are milliseconds per step of the shard."""

    speed: float  # tokens per second
    step: float
    rows: dict[str, float]
    busy: dict[str, float]
    waited: dict[str, float]


def second_half(samples: list[Sample]) -> Half:
    half = [s for s in samples if s.at >= samples[-1].at / 2]
    first, last = half[0], half[-1]
    seconds, steps = last.at - first.at, last.steps - first.steps
    busy, waited = ({g: 1000 * s / steps for g, s in between(first, last, what).items()} for what in ("busy", "waited"))
    return Half(
        (last.tokens - first.tokens) / seconds, 1000 * seconds / steps, between(first, last, "rows"), busy, waited
    )


def describe(mode: str, half: Half) -> None:
    print(
        f"autoscaler {mode:3}  {half.speed:6.1f} tokens/s  step {half.step:.1f} ms, {sum(half.waited.values()):.1f} of "
        f"them waiting for groups  rows max/mean {spread(half.rows):.3f}  time computing max/mean "
        f"{spread(half.busy):.3f}"
    )
    for name in half.rows:
        print(f"    {name}: {half.rows[name]:.0f} rows, computes {half.busy[name]:.1f} ms of a step")


def compare(model: Path, options: argparse.Namespace) -> None:
    halves, reached = {}, 0.0
    for mode in ("off", "on"):
        samples = run(model, mode, options)
        halves[mode] = second_half(samples)
        describe(mode, halves[mode])
        if mode == "on":
            path = [(round(s.at), round(s.heat, 2), s.version) for s in samples if s.at <= LIMIT]
            print("    (second, rows max/mean, placement version): " + " ".join(map(str, path[::3])))
            # From when on it stays below.
            above = [s.at for s in samples if s.heat >= THRESHOLD]
            reached = above[-1] if above else 0.0
    gain = halves["on"].speed / halves["off"].speed
    off = halves["off"]
    saved = max(off.busy.values()) - sum(off.busy.values()) / len(off.busy)
    print(
        f"off, the busiest group computes {saved:.1f} ms of a {off.step:.1f} ms step longer than if all computed "
        f"alike: without them, throughput × {off.step / (off.step - saved):.2f}"
    )
    print(
        f"criterion 2: max/mean below {THRESHOLD} from {reached:.0f} s of traffic on (wanted: {LIMIT:.0f} s); "
        f"throughput × {gain:.2f} (wanted: {GAIN})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a skewed checkpoint; a small one is made where this is not given")
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic, for each of the two")
    parser.add_argument("--attention-threads", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--whole",
        action="store_true",
        help="answers come at their end, not token by token: the front door then costs little",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options.model or skewed_checkpoint(Path(folder) / "skewed"), options)
    if options.model is None:
        print(
            "    of the small model; its groups compute for so little of a step that its throughput says nothing: "
            "give --model"
        )


if __name__ == "__main__":
    main()
