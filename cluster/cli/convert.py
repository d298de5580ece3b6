"""`isotherm convert` as its user sees it: what is written, and how fast."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from isotherm.actors.models.converter import convert
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.model.weight_choice import WeightChoice


def convert_checkpoint(source: Path, out: Path, choice: WeightChoice, console: Console) -> JSON:
    """Bytes and files of what `out` is then. Raises what `convert` raises."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as shown:
        task = shown.add_task(f"writing {out.name}", total=None)
        plan = convert(
            source, out, choice, progress=lambda done, total: shown.update(task, completed=done, total=total)
        )
    total = plan.index["metadata"]["total_size"]
    return {"path": str(out), "weights": choice.words, "bytes": total, "files": len(plan.shards)}
