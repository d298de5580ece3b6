"""Far more clients than there is room for: what they get, how long /health takes, and what of the goodput is left.

python tests/bench/overload.py [--clients 600] [--seconds 30] [--rounds 3] [--url-port PORT]

Starts the bundled model with its default manifest and loads it in turn with a few clients and with many. Fails where an
answer was neither a whole stream nor 429 or 503 with Retry-After, where /health took longer than a second at the 99th
percentile, or where the goodput with many clients was below 90 % of that with few (medians of the rounds)."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
sys.path.insert(0, str(HELPERS))

from burst import Report, rank  # noqa: E402
from served import Served  # noqa: E402


def load(port: int, clients: int, seconds: float, seed: int, tokens: int) -> Report:
    """In a process of its own, so that nothing of this one's is measured."""
    burst = {"port": port, "clients": clients, "seconds": seconds, "seed": seed, "tokens": tokens}
    done = subprocess.run(
        [sys.executable, str(HELPERS / "burst.py"), json.dumps(burst)], capture_output=True, text=True, check=True
    )
    return Report(**json.loads(done.stdout))


def show(name: str, report: Report) -> None:
    first = f"{rank(report.first, 0.5):.2f}/{rank(report.first, 0.99):.2f}"
    health = "/".join(f"{rank(report.health, part) * 1e3:.0f}" for part in (0.5, 0.99, 1.0))
    print(
        f"{name:>12}: goodput {report.goodput:7.1f} tok/s, {report.complete} streams, {report.refused} refused, "
        f"first byte p50/p99 {first} s, /health p50/p99/max {health} ms, "
        f"Retry-After up to {max(report.retry_after, default=0)} s, {len(report.wrong)} wrong",
        flush=True,
    )
    for wrong in report.wrong[:3]:
        print(f"              {wrong}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=600)
    parser.add_argument("--few", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--port", type=int, help="of a server that runs already")
    options = parser.parse_args()
    if options.port is not None:
        return compare(options.port, options)
    with tempfile.TemporaryDirectory() as folder, Served({"model": "tiny"}, Path(folder)) as served:
        return compare(served.port, options)


def compare(port: int, options: argparse.Namespace) -> int:
    reports: dict[str, list[Report]] = {"few": [], "many": []}
    load(port, options.few, 2, 99, options.tokens)
    for round_ in range(options.rounds):
        for name, clients in (("few", options.few), ("many", options.clients)):
            reports[name].append(load(port, clients, options.seconds, 2 * round_ + (name == "many"), options.tokens))
            show(f"{clients} clients", reports[name][-1])
    few, many = (statistics.median(report.goodput for report in reports[name]) for name in ("few", "many"))
    slowest = max(rank(report.health, 0.99) for report in reports["many"])
    wrong = [word for both in reports.values() for report in both for word in report.wrong]
    print(f"goodput kept {many / few:.1%}; /health p99 {slowest * 1e3:.0f} ms at worst; {len(wrong)} wrong answers")
    return int(bool(wrong) or slowest > 1 or many < 0.9 * few)


if __name__ == "__main__":
    sys.exit(main())
