"""Terminal views of reports and states."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isotherm.cluster.cli.printable import printable
from isotherm.cluster.cli.user_errors import errors
from isotherm.cluster.cli.worker_table import speculation_lines, totals, worker_table
from isotherm.cluster.client.batch import BatchSummary
from isotherm.cluster.client.params import Operation
from isotherm.cluster.deploy.inspect import Report
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import human_bytes
from isotherm.cluster.messages.operations import summed_up

NAMED = 3  # of the batches that wait for the same
WAIT_SECONDS = 4.0  # of a command, after which it says what it waits for; the cluster itself knows after two


def human_count(count: int) -> str:
    """671026419200 → 671.0 B."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return str(count)


def show_report(report: Report, console: Console) -> None:
    console.print(f"[bold]{escape(report.path)}[/]  {report.files} weight file(s)", soft_wrap=True)
    for name, value in report.architecture.items():
        console.print(f"  {name.replace('_', ' '):24} {value}", highlight=False, markup=False)
    p = report.parameters
    mtp = (
        f", {human_count(p['multi_token_prediction'])} more for multi-token prediction"
        if p["multi_token_prediction"]
        else ""
    )
    console.print(
        f"  {'parameters':24} {human_count(p['total'])} total, {human_count(p['active'])} active per token{mtp}",
        highlight=False,
    )
    console.print(f"  {'KV cache':24} {human_bytes(report.kv_bytes_per_token)} per token", highlight=False)
    parts = Table("part", "parameters", "bytes", title=f"bytes from {report.bytes_from}", title_justify="left")
    for part, size in report.bytes_by_part.items():
        parts.add_row(part, human_count(report.parameters_by_part.get(part, 0)), human_bytes(size))
    console.print(parts)
    kept = "" if report.kept == "stored" else f", with {report.kept}"
    workers = Table(
        "worker", "weights", "KV cache", "holds", title=f"what the manifest places where{kept}", title_justify="left"
    )
    for row in report.placement:
        kv = f"{human_bytes(row['kv_bytes'])} = {row['kv_tokens']} tokens" if "kv_bytes" in row else ""
        holds = f"{row['experts']} experts" if "experts" in row else "all but routed experts"
        workers.add_row(row["worker"], human_bytes(row["weight_bytes"]), kv, holds)
    console.print(workers)


def show_status(status: JSON, console: Console) -> None:
    controller, model = status["controller"], status["model"]
    version = (
        "no placement yet"
        if status["placement_version"] is None
        else f"placement version {status['placement_version']}"
    )
    phase, pid = escape(controller["phase"]), controller["pid"]
    console.print(
        f"[bold]{escape(model['id'])}[/]  {phase}  {version}  controller pid {pid}", highlight=False, soft_wrap=True
    )
    if fingerprint := status.get("numerics", {}).get("system_fingerprint"):
        known = status["numerics"]["numerics"]
        words = "; ".join(f"{n['dtype']}, {n['kernels']} {n['instructions']}, weights {n['weights']}" for n in known)
        console.print(f"numerics {fingerprint}  {words}", highlight=False, markup=False, soft_wrap=True)
    if (leaving := status.get("leaving")) is not None:
        left = "some" if leaving["open_requests"] is None else leaving["open_requests"]
        weights = f"{leaving['path']}, {leaving['system_fingerprint']}"
        words = f"{left} streams finish on revision {leaving['revision']} ({weights}), which was rolled away"
        console.print(words, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{totals(status['workers'])}", highlight=False, markup=False)
    console.print(worker_table(status["workers"], console.width))
    for words in (*speculation_lines(status["workers"]), *_processes(status["workers"])):
        console.print(words, highlight=False, markup=False, soft_wrap=True)
    for words in _waiting_batches(status.get("waiting_batches", [])):
        console.print(words, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for node in status["nodes"]:
        states = [word for word, shown in (("dead", not node["alive"]), ("drained", node.get("drained"))) if shown]
        console.print(
            f"node {node['id']}  {node['address']}  {', '.join(states)}".rstrip(),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _waiting_batches(waiting: Sequence[JSON]) -> Iterator[str]:
    """A line for all that wait for the same."""
    alike: dict[str, list[str]] = {}
    for batch in waiting:
        alike.setdefault(batch["message"], []).append(batch["id"])
    for message, ids in alike.items():
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        yield f"{', '.join(ids[:NAMED])}{more}: {message}"


def _processes(workers: Sequence[JSON]) -> Iterator[str]:
    """Where the workers run, with which kernels and links: a line for all that have the same."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for worker in workers:
        links = ", ".join(sorted(set(worker.get("links", {}).values())))
        place = worker.get("host", ""), worker.get("kernels", ""), links
        pid = "" if worker["pid"] is None else f" (pid {worker['pid']})"
        alike.setdefault(place, []).append(f"{worker['id']}{pid}")
    for (host, kernels, links), names in alike.items():
        if host:
            yield f"{host}  {kernels} kernels  {f'links over {links}  ' if links else ''}{', '.join(names)}"


def telling_waits(operation_id: str) -> Callable[[Operation], None]:
    """To be given an operation at each look: says once, when that has gone on for a few seconds, what it waits for. On
    standard error, for what is printed at last may be JSON."""
    until, told = time.monotonic() + WAIT_SECONDS, False

    def look(operation: Operation) -> None:
        nonlocal told
        waiting = operation.get("waiting", [])
        if told or not waiting or time.monotonic() < until:
            return
        told = True
        said = printable(f"{operation_id}: {summed_up(waiting)}", errors.is_terminal)
        errors.print(said, markup=False, highlight=False, soft_wrap=True)

    return look


def end_with(operation: Operation, console: Console, as_json: bool) -> None:
    """What a command that began an operation prints at last. Raises typer.Exit 1 where it was rolled back."""
    if as_json:
        print(json.dumps(operation))
    else:
        console.print(f"{operation['id']}: {operation['phase']}", highlight=False)
        for line in [*operation["plan"], *operation["reasons"]]:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    if operation["phase"] in ("rolled_back", "failed"):
        raise typer.Exit(1)


def show_batch_summary(summary: BatchSummary, console: Console) -> None:
    style = "green" if not summary.failed and not summary.unfinished else "yellow"
    done = summary.completed + summary.resumed
    counts = (
        f"{done} of {summary.total} rows done ({summary.resumed} from an earlier run), {summary.failed} with an error"
    )
    left = f", {summary.unfinished} left: {summary.reason}" if summary.unfinished else ""
    for line in (counts + left, *(f"  {note}" for note in summary.notes)):
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
