"""`isotherm convert`: writes a checkpoint with its weights in fewer bits, and shows how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from isotherm.cluster.cli.weight_options import DenseOption, ExpertsOption


def convert_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help='a directory, a hub id or "tiny"')],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="a folder; one that was begun is gone on with")],
    experts: ExpertsOption = None,
    dense: DenseOption = None,
    head: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="stored, fp8, int8 or int4: the output head; there is no format of six bits"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Write a checkpoint with its weights in fewer bits, in compressed-tensors' format."""
    from isotherm.actors.models.converter import convert
    from isotherm.cluster.manifest import human_bytes
    from isotherm.cluster.model.path import resolve_model
    from isotherm.cluster.model.weight_choice import WeightChoice

    choice = WeightChoice().with_changes(experts, dense, head)
    source = resolve_model(model)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn()
    console = Console(stderr=True, emoji=False)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as shown:
        task = shown.add_task(f"writing {out.name}", total=None)
        plan = convert(
            source, out, choice, progress=lambda done, total: shown.update(task, completed=done, total=total)
        )
    found = {"path": str(out), "weights": choice.words, "bytes": plan.nbytes, "files": len(plan.shards)}
    words = f"{out}: {choice.words}; {human_bytes(plan.nbytes)} in {len(plan.shards)} file(s)"
    print(json.dumps(found) if as_json else words)
