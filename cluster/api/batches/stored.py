"""What is said of a file or a batch, as JSON on disk: whole after a power cut, or as if it were not there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid
from pathlib import Path

from isotherm.cluster.jsontypes import JSON

log = logging.getLogger(__name__)
_unreadable: set[Path] = set()  # of which the log was told


def read(path: Path) -> JSON | None:
    """What was written there; None where there is nothing, or nothing that can be read, which the log is told once."""
    try:
        said = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if (found := parsed(said)) is None and path not in _unreadable:
        _unreadable.add(path)
        log.error("%s cannot be read: it has %d bytes, and they are no JSON object; it is left out", path, len(said))
    return found


def parsed(said: bytes) -> JSON | None:
    """The JSON object that these bytes are; None where they are none."""
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write(path: Path, value: JSON) -> None:
    """All of it or, where that raises OSError, nothing."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(part, "wb") as file:
            file.write(json.dumps(value, ensure_ascii=False).encode())
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before what it names
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    with contextlib.suppress(OSError):  # it is written, and not every shared file system syncs a folder
        to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Return when a file's content, or a folder's names, are there after a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def owner_of(found: JSON) -> str:
    """The name of the key that a stored file or batch belongs to; "" of one that was made without a key."""
    return str(found.get("owner", ""))
