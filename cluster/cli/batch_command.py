"""`isotherm batch` as a command: its options, and its exit status."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from isotherm.cluster.cli.key_file import KeyFileOption
from isotherm.cluster.cli.served_url import running_url
from isotherm.cluster.on_ray.environment import prepare_attach

console = Console(emoji=False)
INPUT_HELP = (
    "requests in OpenAI's batch format, or their bodies alone: JSON Lines (also .gz) or Parquet; "
    "a path, a glob in quotes, -: standard input, or the URL of Parquet (s3://…), which Ray Data reads; may be given "
    "several times"
)
PRIORITY_HELP = "of rows that name none; lower values have their turn first, other requests have 0"
OWN_HELP = "serve MODEL|MANIFEST for this batch alone: on the Ray of RAY_ADDRESS (a job's own), else on one of its own"


def batch(
    inputs: Annotated[list[str], typer.Option("--input", help=INPUT_HELP)],
    output_path: Annotated[Path, typer.Option("--output", help="results; a file that is there already is completed")],
    url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="endpoint; default: the one of the cluster that this job runs on"),
    ] = None,
    own: Annotated[Optional[str], typer.Option(metavar="MODEL|MANIFEST", help=OWN_HELP)] = None,  # noqa: UP045
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="rows asked at once")] = 32,
    priority: Annotated[int, typer.Option(min=-(2**31), max=2**31 - 1, help=PRIORITY_HELP)] = 100,
    key_file: KeyFileOption = None,
) -> None:
    """Run files of requests against the running cluster; run it again to complete a half-done output.

    Exit status: 0 when every row was answered; 3 when rows were answered with an error; 4 when rows are left for
    another run; 1 when it could not run.
    """
    from isotherm.cluster.cli.batch import at_hand, run, run_on_own
    from isotherm.cluster.cli.views import show_batch_summary
    from isotherm.cluster.client.batch import BatchOptions

    if url is not None and own is not None:
        raise typer.BadParameter("give --url or --own, not both")
    options = BatchOptions(concurrency, priority)
    with at_hand(inputs) as inputs:
        if own is not None:
            address = prepare_attach(None) if os.environ.get("RAY_ADDRESS") else None
            summary = run_on_own(own, address, inputs, output_path, options)
        else:
            summary = run(inputs, output_path, running_url(None) if url is None else url, options)
    show_batch_summary(summary, console)
    if summary.exit_status:
        raise typer.Exit(summary.exit_status)
