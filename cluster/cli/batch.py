"""`isotherm batch` as its user sees it: progress on standard error, and a cluster of its own where one is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from isotherm.cluster.cli.own_cluster import OwnCluster
from isotherm.cluster.client.async_client import AsyncClient
from isotherm.cluster.client.batch import BatchOptions, BatchSummary, ProgressCallback, run_batch
from isotherm.cluster.client.batch_input import check_there

_PLAIN_INTERVAL_S = 5.0


def run(inputs: str | Path | Sequence[str | Path], output: Path, url: str, options: BatchOptions) -> BatchSummary:
    """Runs a batch with progress on standard error: a bar on a terminal, else a line every few seconds. Raises
    BatchError, OSError."""

    async def go(progress: ProgressCallback) -> BatchSummary:
        async with AsyncClient(url) as client:
            return await run_batch(inputs, output, client, options, progress)

    if not sys.stderr.isatty():
        return asyncio.run(go(_plain_progress()))
    columns = (
        TextColumn("batch"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("batch", total=None, failed=0)

        def show(summary: BatchSummary) -> None:
            bar.update(task, total=summary.total, completed=summary.resumed + summary.completed, failed=summary.failed)

        return asyncio.run(go(show))


def run_on_own(
    model: str, address: str | None, inputs: Sequence[str], output: Path, options: BatchOptions
) -> BatchSummary:
    """The same on a cluster that serves MODEL|MANIFEST for this batch alone: on the Ray at `address`, or on one of its
    own. It is gone when this returns, whatever ends it. Raises OwnClusterError, BatchError, OSError."""
    check_there(inputs, output)  # before a cluster is started for it
    arguments = [model] if address is None else [model, "--address", address]
    with _signals_end(), OwnCluster(*arguments) as cluster:
        return run(inputs, output, cluster.url, options)


@contextlib.contextmanager
def _signals_end() -> Iterator[None]:
    """What would end this process at once has it end what it has started first."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _plain_progress() -> ProgressCallback:
    shown = -_PLAIN_INTERVAL_S

    def show(summary: BatchSummary) -> None:
        nonlocal shown
        done = summary.resumed + summary.completed
        if time.monotonic() - shown < _PLAIN_INTERVAL_S and done < summary.total:
            return
        shown = time.monotonic()
        with contextlib.suppress(OSError):  # a reader of the progress that went away ends no batch
            print(f"batch: {done} of {summary.total} rows done, {summary.failed} failed", file=sys.stderr, flush=True)

    return show
