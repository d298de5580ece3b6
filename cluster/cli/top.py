"""`isotherm top`: workers, operations and the heat of every expert, live in the terminal. What is shown is a pure
function of what is known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.style import Style
from rich.table import Table
from rich.text import Text

from isotherm.cluster.cli.chat import NoServerError
from isotherm.cluster.cli.looks import Sample, looks
from isotherm.cluster.cli.worker_table import speculation_lines, totals, worker_table
from isotherm.cluster.client import Client, ConnectionFailedError
from isotherm.cluster.jsontypes import JSON

T = TypeVar("T")
RAMP = " .:-=+*#%@"  # cold … hot, where there are no colours
COLDEST, HOTTEST = 1 / 8, 8.0  # times the layer's mean: the ends of the scale
HOT_EXPERTS = 4
DRAFTING_SHARDS = 2  # that have a line of their own
TIMEOUT = 15.0  # seconds; a stream that has nothing to tell has a comment every 5 s, and begins within 10 s


# --- what is shown --------------------------------------------------------------------------------


def frame(now: Sample, url: str, width: int, height: int, colours: bool, trouble: str = "") -> RenderableType:
    """One picture, `width` × `height` characters at most. `trouble`: why `now` is old."""
    parts = [_head(now, url, width)]
    if trouble:
        parts.append(Text(trouble, style="bold red"))
    elif now.note:
        parts.append(Text(now.note, style="yellow"))
    parts += [*_operation(now.status.get("operation")), *_autoscaler(now.autoscaler)]
    parts += map(Text, islice(speculation_lines(now.status["workers"]), DRAFTING_SHARDS))
    parts += _hottest(now.experts, width)
    # The table's heading and a line of space, the map's heading, and the last line for the cursor
    left = height - len(parts) - 4
    layers = now.experts["layers"]
    lines = min(max(left // 2, left - len(now.status["workers"])), len(layers) if not colours else -(-len(layers) // 2))
    table = _workers(now, width, max(1, left - max(0, lines)))
    return Group(*(_cut(part, width) for part in parts), table, *_heat_map(layers, width, max(0, lines), colours))


def _cut(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    text.no_wrap = True
    return text


def _head(now: Sample, url: str, width: int) -> Text:
    """Of the model, its load, its placement and its URL as much as there is room for."""
    status = now.status
    phase = status["controller"]["phase"]
    version = status["placement_version"]
    head = Text.assemble((status["model"]["id"], "bold"), "  ", (phase, "green" if phase == "serving" else "yellow"))
    placed = f"placement {version if version is not None else '-'}"
    for words in (*totals(status["workers"]).split("  "), placed, url):
        if len(head) + 2 + len(words) > width:
            break
        head.append(f"  {words}")
    return head


def _operation(operation: JSON | None) -> Iterator[Text]:
    if operation is None:
        yield Text("no operation under way", style="dim")
        return
    target = ", ".join(
        f"{name} {value if not isinstance(value, list) else len(value)}" for name, value in operation["target"].items()
    )
    done = round(20 * operation["progress"])
    bar = "━" * done + "╌" * (20 - done)
    yield Text(f"{operation['id']} {bar} {operation['phase']}  {target}  ({operation['origin']})", style="cyan")
    for reason in operation.get("waiting", [])[:2]:
        yield Text(f"  {reason}", style="yellow")


def _autoscaler(report: JSON | None) -> Iterator[Text]:
    if report is None:
        return
    last = report["decisions"][-1] if report["decisions"] else None
    words = "no decision yet" if last is None else f"{last['kind']} ({last['result']}): {last['reason']}"
    yield Text(f"autoscaler {report['mode']}  {words}", style="magenta")


def _hottest(experts: JSON, width: int) -> Iterator[Text]:
    """As many as there is room for, of a few."""
    found = [(rate, layer["layer"], e, held) for layer in experts["layers"]
             for e, (rate, held) in enumerate(zip(_rates(layer), layer["holders"], strict=True)) if rate]  # fmt: skip
    words = "hottest"
    for _, layer, e, held in sorted(found, key=lambda f: (-f[0], f[1:3]))[:HOT_EXPERTS]:
        more = f"{words}   layer {layer} expert {e} on {', '.join(held)}"
        if len(more) > width and words != "hottest":
            break
        words = more
    if found:
        yield Text(words)


def _workers(now: Sample, width: int, lines: int) -> Table:
    """One row each; with more workers than lines, shards and the hottest groups."""
    heat = now.experts.get("heat", {})
    workers = sorted(now.status["workers"], key=lambda w: (w["role"] != "attention", -heat.get(w["id"], 0.0)))
    shown = workers if len(workers) <= lines else workers[: max(0, lines - 1)]
    return worker_table(shown, width, len(workers) - len(shown))


def _heat_map(layers: Sequence[JSON], width: int, lines: int, colours: bool) -> Iterator[Text]:
    """Layers from top to bottom, experts from left to right, each against its layer's mean. Where there is no room for
    all, neighbours share a character, which shows the hottest of them; with colours a character is two lines high. A
    layer that no group has had rows of has no line: a shard may keep the experts of one that guesses itself."""
    busy = [layer for layer in layers if any(_rates(layer))]
    idle = [layer for layer in layers if not any(_rates(layer))] if busy else []
    layers = busy or layers
    if not layers or lines < 1:
        return
    digits = len(str(layers[-1]["layer"]))
    rows = lines * (2 if colours else 1)
    cells = [[_relative(layer) for layer in chunk] for chunk in _chunks(layers, rows)]
    heats = [_pooled([max(column) for column in zip(*chunk, strict=True)], width - digits - 2) for chunk in cells]
    names = [str(chunk[0]["layer"]) for chunk in _chunks(layers, rows)]
    without = f"; no rows of layer {', '.join(str(layer['layer']) for layer in idle)}" if idle else ""
    yield _cut(Text(f"heat of {len(layers[0]['rows'])} experts in {len(layers)} layers, 1/8 … 8 × the layer's mean"
                    f"{without}", style="bold"), width)  # fmt: skip
    step = 2 if colours else 1
    for i in range(0, len(heats), step):
        line = Text(f"{names[i]:>{digits}}  ", no_wrap=True)
        if not colours:
            line.append("".join(RAMP[round(h * (len(RAMP) - 1))] for h in heats[i]))
        else:
            lower: Sequence[float | None] = heats[i + 1] if i + 1 < len(heats) else [None] * len(heats[i])
            for top, bottom in zip(heats[i], lower, strict=True):
                line.append("▀", Style(color=_colour(top), bgcolor=None if bottom is None else _colour(bottom)))
        yield line


def _rates(layer: JSON) -> list[float]:
    rates: list[float] = layer["rate"] if any(layer.get("rate", [])) else layer["rows"]
    return rates


def _relative(layer: JSON) -> list[float]:
    """Each expert's place on the scale, 0 … 1; 0.5 is the layer's mean."""
    rates = _rates(layer)
    mean = sum(rates) / len(rates)
    span = math.log(HOTTEST / COLDEST)
    return [math.log(min(max(rate / mean, COLDEST), HOTTEST) / COLDEST) / span if mean else 0.0 for rate in rates]


def _chunks(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """At most `count` runs of neighbours, as even as can be."""
    count = min(count, len(items))
    return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]


def _pooled(values: Sequence[float], count: int) -> list[float]:
    return [max(chunk) for chunk in _chunks(values, max(1, count))]


def _colour(heat: float) -> str:
    """Blue over grey to red."""
    cold, mean, hot = (24, 32, 96), (120, 120, 120), (255, 64, 24)
    low, high, at = (cold, mean, 2 * heat) if heat < 0.5 else (mean, hot, 2 * heat - 1)
    r, g, b = (round(a + (z - a) * at) for a, z in zip(low, high, strict=True))
    return f"rgb({r},{g},{b})"


# --- showing it -----------------------------------------------------------------------------------


def run_top(
    url: str, interval: float, once: bool, console: Console, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Until Ctrl-C, or for one frame. A server that is gone is waited for, with the last picture. Raises NoServerError
    where none answers at the start, and APIError where it is not Isotherm's."""
    with Client(url, timeout=TIMEOUT, max_retries=0) as client, closing(looks(client, interval, sleep)) as found:
        try:
            now = next(sample for sample in found if isinstance(sample, Sample))
        except ConnectionFailedError as error:
            raise NoServerError(
                f"no server answers at {error}; start one with: isotherm serve, or name another with --url"
            ) from None
        trouble = ""

        def picture() -> RenderableType:
            size = console.size  # asked anew each time: a window may have been resized
            since = f"as it was {time.monotonic() - now.time:.0f} s ago: {trouble}" if trouble else ""
            return frame(now, url, size.width, size.height, console.color_system is not None, since)

        if once:
            console.print(picture())
            return
        try:
            with Live(get_renderable=picture, console=console, screen=True, refresh_per_second=4):
                for sample in found:
                    if isinstance(sample, Sample):
                        now, trouble = sample, ""
                    else:
                        trouble = sample
        except KeyboardInterrupt:
            return
