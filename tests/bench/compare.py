"""`make bench`: Isotherm beside its peers, in turn, in one run; medians and their ratios.

    python tests/bench/compare.py --bf16 MODEL [--fp8 MODEL] [--head8] [--int4] [--isa avx2] [--rounds 5]
      [--vllm PYTHON] [--llama-cpp DIR] [--ik-llama-cpp DIR] [--gguf FILE …]

Sides: Isotherm on the bf16 and on the FP8 checkpoint, transformers on the bf16 one (--no-transformers where memory is
short), and where they are given vLLM (a Python that has it) and llama.cpp builds (a folder with llama-batched-bench,
with GGUF files of the same model). Each side loads once and is asked in turn; llama.cpp's loads anew in each round, and
measures every size twice, of which the second counts.

ik_llama.cpp's own llama-batched-bench gives every stream the same token, so that all rows go to the same few experts:
change it to draw tokens at random, as llama.cpp's does, or its figures at 8 and 32 streams say little.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Protocol

HERE = Path(__file__).parent
WORK = [("decode", 1), ("decode", 8), ("decode", 32), ("prefill", 512)]
TOKENS = 32


class Side(Protocol):
    name: str

    def ask(self, what: str, size: int) -> float: ...

    def close(self) -> None: ...


class ProcessSide:
    """A loaded model behind sides.py."""

    def __init__(self, name: str, python: str, side: str, *arguments: str):
        self.name = name
        self._process = subprocess.Popen(
            [python, str(HERE / "sides.py"), side, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}")
        return line

    def ask(self, what: str, size: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {size}" + (f" {TOKENS}" if what == "decode" else "") + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class LlamaSide:
    """llama-batched-bench: one process decodes at all widths of a round, another takes the prompt in."""

    def __init__(self, name: str, build: Path, gguf: Path, extra: tuple[str, ...] = ()):
        self.name, self._gguf, self._extra = name, gguf, extra
        self._binary = next(
            p for p in (build / "bin" / "llama-batched-bench", build / "llama-batched-bench") if p.exists()
        )
        self._round: dict[tuple[str, int], float] = {}

    def ask(self, what: str, size: int) -> float:
        if (what, size) not in self._round:
            self._run([s for w, s in WORK if w == "decode"], 32, TOKENS)
            self._run([1], next(s for w, s in WORK if w == "prefill"), 1)
        return self._round.pop((what, size))

    def _run(self, widths: list[int], prompt: int, tokens: int) -> None:
        twice = ",".join(str(w) for w in widths for _ in range(2))
        command = [str(self._binary.resolve()), "-m", str(self._gguf.resolve()), "-c", "4096", "-npp", str(prompt),
                   "-ntg", str(tokens), "-npl", twice, "-t", "2", *self._extra]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:  # it leaves a log where it runs
            run = subprocess.run(
                command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                timeout=600,
            )  # fmt: skip
        rows = [
            [c.strip() for c in line.strip("|").split("|")]
            for line in run.stdout.splitlines()
            if re.match(r"\|\s*\d", line)
        ]
        if len(rows) != 2 * len(widths):
            raise RuntimeError(f"{self.name} measured {len(rows)} of {2 * len(widths)} sizes: {run.stdout[-500:]}")
        for row in rows[1::2]:
            # S_TG or S_PP, tokens/s
            what, size, column = ("decode", int(row[2]), 7) if tokens > 1 else ("prefill", int(row[0]), 5)
            self._round[what, size] = float(row[column])

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bf16", required=True)
    parser.add_argument("--fp8")
    parser.add_argument(
        "--head8",
        action="store_true",
        help="also the FP8 checkpoint with an 8-bit output projection, an opt-in of the manifest",
    )
    parser.add_argument(
        "--int4",
        action="store_true",
        help="also the FP8 checkpoint with experts and dense parts in INT4, the head in 8, 6 and 4 bits",
    )
    parser.add_argument("--isa", default="auto", help="instruction set of Isotherm's kernels; build the peers for it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transformers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--vllm", help="a Python interpreter that has vllm")
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--ik-llama-cpp", type=Path)
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args()

    def own(name: str, model: str, *choice: str) -> ProcessSide:
        return ProcessSide(f"isotherm {name}", sys.executable, "isotherm", model, f"isa={a.isa}", *choice)

    sides: list[Side] = [own("bf16", a.bf16)]
    if a.fp8:
        sides.append(own("fp8", a.fp8))
        if a.head8:
            sides.append(own("fp8, head8", a.fp8, "head=fp8"))
        if a.int4:
            sides.append(own("int4", a.fp8, "experts=int4", "dense=int4", "head=int8"))
            sides.append(own("int4, head6", a.fp8, "experts=int4", "dense=int4", "head=int6"))
            sides.append(own("int4, head4", a.fp8, "experts=int4", "dense=int4", "head=int4"))
    if a.transformers:
        sides.append(ProcessSide("transformers bf16", sys.executable, "transformers", a.bf16))
    if a.vllm:
        sides.append(ProcessSide("vllm bf16", a.vllm, "vllm", a.bf16))
    for gguf in a.gguf:
        if a.llama_cpp:
            sides.append(LlamaSide(f"llama.cpp {gguf.stem}", a.llama_cpp, gguf))
        if a.ik_llama_cpp:
            sides.append(LlamaSide(f"ik_llama.cpp {gguf.stem}", a.ik_llama_cpp, gguf, ("-rtr",)))
    figures: dict[str, dict[str, list[float]]] = {s.name: {} for s in sides}
    try:
        for round_ in range(a.rounds + 1):  # the first is a warm-up
            for what, size in WORK:
                for side in sides:
                    value = side.ask(what, size)
                    if round_:
                        figures[side.name].setdefault(f"{what} {size}", []).append(value)
            print(f"round {round_} of {a.rounds}", file=sys.stderr)
    finally:
        for side in sides:
            side.close()
    report(figures, a.json, a.plot)


def report(figures: dict[str, dict[str, list[float]]], as_json: bool, plot: Path | None) -> None:
    medians = {side: {work: statistics.median(runs) for work, runs in works.items()} for side, works in figures.items()}
    peers = [side for side in medians if not side.startswith("isotherm")]
    works = [f"{what} {size}" for what, size in WORK]
    best = {work: max(peers, key=lambda side: medians[side][work]) for work in works} if peers else {}
    if as_json:
        print(json.dumps({"runs": figures, "medians": medians, "best_peer": best}))
    else:
        print(f"{'tokens/s, median':24}" + "".join(f"{work:>14}" for work in works))
        for side, row in medians.items():
            print(f"{side:24}" + "".join(f"{row[work]:14.1f}" for work in works))
        if peers:
            report_peers(medians, best)
    if plot is not None:
        from isotherm.cluster.cli.bench_plot import plot_bars

        labels = [f"{side} {work}" for work in works for side in medians]
        plot_bars(
            plot, "tokens per second", labels, [medians[side][work] for work in works for side in medians], "tokens/s"
        )


def report_peers(medians: dict[str, dict[str, float]], best: dict[str, str]) -> None:
    """`best`: of the peers, by what was done."""
    for side, row in medians.items():
        if side.startswith("isotherm"):
            ratios = "".join(f"{row[work] / medians[best[work]][work]:13.2f}×" for work in best)
            print(f"{side + ' / best peer':24}{ratios}")
    print(f"{'best peer':24}" + "".join(f"{side[:13]:>14}" for side in best.values()))


if __name__ == "__main__":
    main()
