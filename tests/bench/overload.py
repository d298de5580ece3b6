"""Ten times as many clients as there is room for: what they get, how long /health takes, what is left of the goodput,
whether memory grows; and how two keys share a server that both have too much for.

python tests/bench/overload.py [--times 10] [--seconds 60] [--rounds 1] [--port PORT] [--only load|keys]

Starts the bundled model with its default manifest and loads it in turn with a few clients and with many. Fails where an
answer was neither a whole stream nor 429 or 503 with Retry-After, where /health took longer than a second at the 99th
percentile, where the goodput with many clients was below 90 % of that with few (medians of the rounds), where the
server's memory grew by more than a tenth in the second half of a load, or where keys of the weights 3 and 1 did not get
tokens three to one, within 10 %. The keys are served without Ray: all that decides about them is in one process."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
sys.path.insert(0, str(HELPERS))

from alone_served import alone_served  # noqa: E402
from burst import Report, rank  # noqa: E402
from served import Served  # noqa: E402

WEIGHTS = {"heavy": 3.0, "light": 1.0}


class Memory:
    """Resident bytes of processes while something runs, each second."""

    def __init__(self, processes: Callable[[], list[psutil.Process]]) -> None:
        self._processes, self.seen = processes, list[int]()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(1.0):
            total = 0
            for process in self._processes():
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.seen.append(total)

    @property
    def growth(self) -> float:
        """Of the last quarter over the second, each by its median."""
        quarter = max(1, len(self.seen) // 4)
        return statistics.median(self.seen[-quarter:]) / statistics.median(self.seen[quarter : 2 * quarter]) - 1


def load(port: int, clients: int, seconds: float, seed: int, **more: object) -> Report:
    """In a process of its own, so that nothing of this one's is measured."""
    burst = {"port": port, "clients": clients, "seconds": seconds, "seed": seed, **more}
    done = subprocess.run(
        [sys.executable, str(HELPERS / "burst.py"), json.dumps(burst)], capture_output=True, text=True, check=True
    )
    return Report(**json.loads(done.stdout))


def show(name: str, report: Report) -> None:
    first, whole = (
        "/".join(f"{rank(seconds, part):.2f}" for part in (0.5, 0.9, 0.99)) for seconds in (report.first, report.whole)
    )
    health = "/".join(f"{rank(report.health, part) * 1e3:.0f}" for part in (0.5, 0.99, 1.0))
    print(
        f"{name:>13}: goodput {report.goodput:7.1f} tok/s, {report.complete} streams, {report.refused} refused, "
        f"status line p50/p90/p99 {first} s, whole {whole} s, /health p50/p99/max {health} ms, "
        f"Retry-After up to {max(report.retry_after, default=0)} s, {len(report.wrong)} wrong",
        flush=True,
    )
    for wrong in report.wrong[:3]:
        print(f"              {wrong}", flush=True)


def compare(port: int, processes: Callable[[], list[psutil.Process]], options: argparse.Namespace) -> bool:
    """Whether a flood changes too much."""
    many = options.times * options.places
    reports: dict[int, list[Report]] = {options.few: [], many: []}
    growth = 0.0
    load(port, options.few, 2, 99, tokens=options.tokens)
    for round_ in range(options.rounds):
        for clients, of in reports.items():
            with Memory(processes) as memory:
                seed = 2 * round_ + (clients == many)
                of.append(load(port, clients, options.seconds, seed, tokens=options.tokens))
            show(f"{clients} clients", of[-1])
            shown = ", ".join(f"{seen / 2**20:.0f}" for seen in memory.seen[:: max(1, len(memory.seen) // 6)])
            print(f"{'':>13}  memory {shown} MiB, in the second half {memory.growth:+.1%}", flush=True)
            growth = max(growth, memory.growth)
    few, flood = (statistics.median(report.goodput for report in of) for of in reports.values())
    slowest = max(rank(report.health, 0.99) for report in reports[many])
    wrong = [word for both in reports.values() for report in both for word in report.wrong]
    print(f"goodput kept {flood / few:.1%}; /health p99 {slowest * 1e3:.0f} ms at worst; {len(wrong)} wrong answers")
    return bool(wrong) or slowest > 1 or flood < 0.9 * few or growth > 0.1


def keys(folder: Path, options: argparse.Namespace) -> bool:
    """Whether keys get anything but their shares."""
    with alone_served(folder, WEIGHTS) as (port, _):
        clients = 2 * 2 * options.places  # each key's are twice as many as all places
        more = {"keys": list(WEIGHTS), "warm": options.seconds / 2, "patience": 2.0}
        report = load(port, clients, options.seconds, 5, tokens=options.tokens, **more)
    show(f"{clients} of 2 keys", report)
    had = {key: report.by_key.get(key, 0.0) for key in WEIGHTS}
    ratio = had["heavy"] / max(had["light"], 1e-9)
    told = ", ".join(f"{key} (weight {WEIGHTS[key]:g}) {tokens:.0f} tok/s" for key, tokens in had.items())
    print(f"{told}: {ratio:.2f} to 1")
    return bool(report.wrong) or not 2.7 <= ratio <= 3.3


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=10, help="clients for each place")
    parser.add_argument("--places", type=int, default=256, help="of the server: max_sequences and max_waiting")
    parser.add_argument("--few", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--port", type=int, help="of a server that runs already")
    parser.add_argument("--only", choices=["load", "keys"])
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        if options.port is not None:
            failed |= compare(options.port, list, options)
        elif options.only != "keys":
            with Served({"model": "tiny"}, Path(folder)) as served:
                failed |= compare(served.port, lambda: list(served._family.values()), options)
        if options.port is None and options.only != "load":
            failed |= keys(Path(folder), options)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
