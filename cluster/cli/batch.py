"""`isotherm batch` as its user sees it: progress on standard error, and a cluster of its own where one is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from isotherm.cluster.cli.own_cluster import OwnCluster
from isotherm.cluster.client.async_client import AsyncClient
from isotherm.cluster.client.batch import BatchOptions, BatchSummary, ProgressCallback, run_batch
from isotherm.cluster.client.batch_input import check_there
from isotherm.cluster.on_ray.environment import prepare_attach

_PLAIN_INTERVAL_S = 5.0


class _Ending:
    """A signal that would end this process at once has it end what it has started first. In an event loop, where it may
    come in the middle of anything, it cancels the task that is noted here."""

    def __init__(self) -> None:
        self._task: asyncio.Task[BatchSummary] | None = None
        self.status = 0

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """SIGTERM and SIGHUP, for this time. One that this process was started to ignore, as by nohup, stays
        ignored."""
        taken = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in taken}
        try:
            yield
        except asyncio.CancelledError:
            raise SystemExit(self.status) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def cancels(self, work: Awaitable[BatchSummary]) -> BatchSummary:
        self._task = asyncio.current_task()
        try:
            return await work
        finally:
            self._task = None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.status = 128 + number
        if self._task is None:
            raise SystemExit(self.status)
        self._task.get_loop().call_soon_threadsafe(self._task.cancel)


def run(
    inputs: str | Path | Sequence[str | Path],
    output: Path,
    url: str,
    options: BatchOptions,
    ending: _Ending | None = None,
) -> BatchSummary:
    """Runs a batch with progress on standard error: a bar on a terminal, else a line every few seconds. Raises
    BatchError, OSError."""

    async def go(progress: ProgressCallback) -> BatchSummary:
        async with AsyncClient(url) as client:
            work = run_batch(inputs, output, client, options, progress)
            return await (work if ending is None else ending.cancels(work))

    if not sys.stderr.isatty():
        return asyncio.run(go(_plain_progress()))
    columns = (
        TextColumn("batch"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, emoji=False)) as bar:
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
    where = "on a Ray of its own" if address is None else f"on the Ray at {address}"
    print(f"batch: serving {model} for this batch alone, {where}", file=sys.stderr, flush=True)
    arguments = [model] if address is None else [model, "--address", address]
    ending = _Ending()
    with ending.taken(), OwnCluster(*arguments) as cluster:
        return run(inputs, output, cluster.url, options, ending)


@contextlib.contextmanager
def at_hand(inputs: Sequence[str]) -> Iterator[list[str]]:
    """The inputs, of which those that lie elsewhere (s3://…) are read by Ray Data into files for this time. Raises
    DatasetError, NoClusterError."""
    if not (uris := [name for name in inputs if "://" in name]):
        yield list(inputs)
        return
    address = prepare_attach(None)
    from isotherm.cluster.on_ray.datasets import fetch_tables

    with tempfile.TemporaryDirectory(prefix="isotherm-batch-") as folder:
        files = dict(zip(uris, fetch_tables(address, uris, Path(folder)), strict=True))
        yield [str(files.get(name, name)) for name in inputs]


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
