"""A disk that is full: what a client is told whose files it cannot take, and of a batch that waits for it."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from isotherm.cluster.api.batches.rows import Fault
from isotherm.cluster.api.errors import NOT_AGAIN, ReplyError
from isotherm.cluster.errors import one_line

log = logging.getLogger(__name__)
_LEAST_BYTES = 64 << 10  # free on a disk that is not full: whoever may write the last blocks, a batch needs more
_FULL = Fault("storage_full", "the server's disk is full; the batch waits until there is room, or its window is over")


def is_full(error: OSError) -> bool:
    """Whether this is why something could not be written: there is no room, or this user may have no more of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def refused_when_full(what: str) -> Iterator[None]:
    """For what a client asks to be kept: raises ReplyError 507 where the disk has no room for it."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        log.warning("%s cannot be kept: %s", what, error)
        message = f"{what} cannot be kept: the server's disk is full; whoever runs the server must make room"
        raise ReplyError(message, status=507, kind="server_error", code="storage_full", headers=NOT_AGAIN) from None


def waits_for(error: OSError) -> Fault:
    """What is said of a batch whose running has met this."""
    if is_full(error):
        return _FULL
    return Fault(
        "storage_unavailable", f"what the batch reads and writes cannot be reached ({one_line(error)}); it waits"
    )


def found_full(folder: Path) -> Fault | None:
    """What is said of every batch in the folder: another replica may run it, and only that one has met the disk."""
    with contextlib.suppress(OSError):
        return _FULL if shutil.disk_usage(folder).free < _LEAST_BYTES else None
    return None
