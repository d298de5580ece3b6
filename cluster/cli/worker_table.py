"""One line for each worker, as `isotherm top` and `isotherm status` show it: 80 columns are enough for both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import human_bytes

_COLUMNS = ("worker", "load", "rate", "memory", "host")


@dataclass(frozen=True)
class WorkerLine:
    """`trouble`: it does not work, and `load` says why."""

    name: str
    host: str
    load: str
    rate: str
    memory: str
    trouble: bool = False


def line_of(worker: JSON) -> WorkerLine:
    """A worker of a cluster's status. Its rates are those that the autoscaler goes by, as GET /metrics has them too;
    one that has just come has none yet."""
    figures: Mapping[str, float] = worker.get("load") or {}
    name, host = worker["id"], worker.get("host", "")
    if "reason" in worker:
        return WorkerLine(name, host, f"{worker['state']}: {worker['reason']}", "", "", trouble=True)
    if "running" in worker:
        load = f"{worker['running']} running, {worker['waiting']} waiting"
        memory = f"KV {worker['kv_blocks_used'] / max(1, worker['kv_blocks']):.0%}"
        return WorkerLine(name, host, load, _rate(figures.get("tokens_per_second"), "tokens/s"), memory)
    if "pairs" in worker:
        load = ", ".join(
            words
            for words in (_figure("heat", figures.get("heat"), ".2f"), _figure("busy", figures.get("busy"), ".0%"))
            if words
        )
        memory = f"{worker['experts']} experts, {human_bytes(worker['weight_bytes'])}"
        return WorkerLine(name, host, load, _rate(figures.get("rows_per_second"), "rows/s"), memory)
    if worker["state"] != "loading" or "progress" not in worker:
        return WorkerLine(name, host, worker["state"], "", "")
    rate = f"{human_bytes(worker['read_bytes_per_second'])}/s" if "read_bytes_per_second" in worker else ""
    memory = f"{human_bytes(worker['read_bytes'])} read" if "read_bytes" in worker else ""
    return WorkerLine(name, host, f"loading, {worker['progress']:.0%}", rate, memory)


def _rate(rate: float | None, unit: str) -> str:
    return "" if rate is None else f"{rate:.0f} {unit}"


def _figure(name: str, figure: float | None, form: str) -> str:
    return "" if figure is None else f"{name} {figure:{form}}"


def worker_table(workers: Sequence[JSON], width: int, left_out: int = 0) -> Table:
    """At most `width` characters wide; `left_out`: workers of those there are. Hosts are left out where all are the
    same, and where there is no room for them."""
    lines = [line_of(worker) for worker in workers]
    cells = [(line.name, line.load, line.rate, line.memory, line.host) for line in lines]
    well = [row for row, line in zip(cells, lines, strict=True) if not line.trouble]
    widths = [max([len(name), *(len(row[i]) for row in well)]) for i, name in enumerate(_COLUMNS)]
    widths[0] = max([widths[0], *(len(line.name) for line in lines)])
    with_hosts = len({line.host for line in lines if line.host}) > 1 and sum(widths) + len(widths) <= width
    count = len(_COLUMNS) if with_hosts else len(_COLUMNS) - 1
    table = Table(*_COLUMNS[:count], box=None, padding=(0, 1, 0, 0), header_style="bold")
    for row, line in zip(cells, lines, strict=True):
        table.add_row(*map(escape, row[:count]), style="yellow" if line.trouble else None)
    if left_out:
        table.add_row(f"… {left_out} more")
    for column in table.columns:
        column.no_wrap = True
    table.columns[0].min_width = widths[0]
    return table


def totals(workers: Sequence[JSON]) -> str:
    """Of all shards: what is said above the table."""
    shards = [worker for worker in workers if "running" in worker]
    loads = [load for shard in shards if (load := shard.get("load"))]
    running, waiting = (sum(shard[name] for shard in shards) for name in ("running", "waiting"))
    speed = f"{sum(load['tokens_per_second'] for load in loads):.0f} tokens/s" if loads else "- tokens/s"
    first = max((load["first_token_seconds"] for load in loads), default=0.0)
    return f"{speed}  {running} running  {waiting} waiting" + (f"  first token {first:.2f} s" if first else "")


def speculation_lines(workers: Sequence[JSON]) -> Iterator[str]:
    """What speculation came to at each shard that has it, and what it does now."""
    for worker in workers:
        if (found := worker.get("speculation")) is None:
            continue
        drafted = found["drafted"]
        right = f"{sum(found['accepted']) / drafted:.0%} of {drafted} were right" if drafted else "none yet"
        yield f"{worker['id']} drafts by {found['kind']}: {right}, gain {found['gain']:.2f}; {found['why']}"
