"""Criterion 5: the traffic's subject changes, and with it the experts that are hot; what the autoscaler makes of it,
and whether it comes to rest.

    python tests/bench_elastic/shift.py [--steady 300]

The bundled model counts for a while, then it tells stories, for `--steady` seconds. Prompts are drawn anew for each
request.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from served import Served
from traffic import Sample, Traffic, imbalance, loaded, watch

from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.text.tokenizer import Tokenizer

STREAMS, TOKENS = 16, 64
LIMIT = 30.0  # seconds in which the placement is to follow
HEROES = ["fox", "dog", "king", "ship", "tree", "girl", "bird", "cat", "bear", "boat", "star", "cloud", "mouse", "frog",
          "duck", "horse"]  # fmt: skip
WINDOW = 5  # looks, a second apart, over which rows are compared


class Subjects:
    """Prompts, of one subject until `subject` is set to another."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.load(bundled_model())
        self.subject = "count"

    def __call__(self, stream: int, turn: int) -> list[int]:
        draw = random.Random(f"{stream} {turn}")
        start = draw.randrange(1, 40)
        text = (
            f"Count from {start} to {start + 40}."
            if self.subject == "count"
            else f"Tell me a story about a {draw.choice(HEROES)}."
        )
        return self._tokenizer.encode_chat([{"role": "user", "content": text}]).ids


def run(before: float, steady: float, mode: str) -> tuple[list[Sample], list[Sample]]:
    """Looks at the cluster while it counts, and while it tells stories."""
    manifest = {"attention": {"threads": 1}, "experts": {"groups": 2, "threads": 1}, "autoscaling": {"mode": mode}}
    prompts = Subjects()
    with tempfile.TemporaryDirectory() as folder, Served(manifest, Path(folder)) as served:
        traffic = Traffic(served.url, "tiny", STREAMS, TOKENS, prompts)

        async def measure() -> tuple[list[Sample], list[Sample]]:
            async with traffic.flowing():
                counting = await watch(served.url, before)
                prompts.subject = "stories"
                return counting, await watch(served.url, steady)

        samples = asyncio.run(measure())
    if traffic.errors:
        raise RuntimeError(f"{len(traffic.errors)} requests failed: {traffic.errors[0]}")
    return samples


def describe(what: str, samples: list[Sample]) -> list[float]:
    """Prints the way; the imbalance (mean over layers) of the rows of each few seconds,
    by the placement at their end."""
    print(f"{what}: (second, rows max/mean over all layers, mean of the layers, placement version)")
    figures = [(s.at, *imbalance(samples[i], s), s.version) for i, s in enumerate(samples[WINDOW:])]
    marks = [
        f for f, g in zip(figures, [None, *figures], strict=False) if g is None or f[3] != g[3] or int(f[0]) % 30 == 0
    ]
    print("    " + "  ".join(f"({at:.0f}, {heat:.2f}, {layers:.2f}, {version})" for at, heat, layers, version in marks))
    return [layers for _, _, layers, _ in figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=float, default=60.0, help="seconds of the first subject")
    parser.add_argument("--steady", type=float, default=300.0, help="seconds of the second subject")
    parser.add_argument("--mode", choices=["on", "advise", "off"], default="on")
    options = parser.parse_args()
    counting, stories = run(options.before, options.steady, options.mode)
    describe("counting", counting)
    describe("stories", stories)
    quiet = 0.4 * options.steady  # two minutes of five
    soon = [s for s in stories if s.at <= LIMIT]
    rest = [s for s in stories if s.at >= options.steady - quiet]
    after, settled = imbalance(soon[0], soon[WINDOW])[1], imbalance(rest[0], rest[-1])[1]
    followed = next((s.at for s in stories if s.version > counting[-1].version), None)
    print(
        f"criterion 5: the shift makes the mean imbalance of the layers {after:.2f}, by the placement of then; the "
        f"placement follows after {'ever' if followed is None else f'{followed:.0f} s'} (wanted: {LIMIT:.0f} s), with "
        f"{loaded(soon)} loads in the first {LIMIT:.0f} s; {loaded(stories)} in {options.steady:.0f} s, {loaded(rest)} "
        f"of them in the last {quiet:.0f} s (wanted: 0); then {settled:.2f}"
    )


if __name__ == "__main__":
    main()
