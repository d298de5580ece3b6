"""Whether files and batches can be kept in the folder that the manifest names for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isotherm.cluster.doctor.finding import Finding, fail, ok, warn
from isotherm.cluster.manifest import HttpSection, human_bytes

_PROBE = b"\0" * (64 << 10)


@dataclass(frozen=True)
class BatchFacts:
    """`trouble`: why nothing can be kept in the folder; empty where it can. `free`, `wanted`: bytes on its disk, and
    those that files and batches may take."""

    folder: str
    trouble: str
    free: int
    wanted: int


def look_at_batches(http: HttpSection, inside: Sequence[str]) -> BatchFacts | None:
    """None where the manifest names no folder. `inside`: names of the folders that are made in it. Makes nothing that
    stays: a folder that is not there is looked at by the nearest one above it that is."""
    if (named := http.batches.folder) is None:
        return None
    folder = Path(named)
    trouble, free = "", 0
    try:
        for path in (folder, *(folder / name for name in inside)):
            _try_to_write(path)
        free = shutil.disk_usage(_nearest(folder)).free
    except OSError as error:
        trouble = error.strerror or str(error)
    return BatchFacts(str(folder), trouble, free, http.batches.max_bytes)


def _nearest(path: Path) -> Path:
    return next(there for there in (path, *path.parents) if os.path.lexists(there))


def _try_to_write(path: Path) -> None:
    """Raises OSError where nothing could be made in this folder, or it could not be made itself."""
    nearest = _nearest(path)
    os.listdir(nearest)
    with tempfile.TemporaryFile(dir=nearest) as file:
        file.write(_PROBE)


def judge_batches(facts: BatchFacts | None) -> list[Finding]:
    if facts is None:
        return []
    where = f"http.batches.folder is {facts.folder}"
    if facts.trouble:
        words = f"{where}: files and batches cannot be kept there ({facts.trouble})"
        return [fail("batches", words, "name a folder that the user who serves can write")]
    words = f"{where}, {human_bytes(facts.free)} free"
    if facts.free < facts.wanted:
        advice = f"http.batches.max_bytes is {human_bytes(facts.wanted)}: batches wait when the disk is full"
        return [warn("batches", words, advice)]
    return [ok("batches", words)]
