"""Programs that a test starts and reads: ended and closed when the test is done with them, whatever came of it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """What it writes, errors too, is its `stdout`."""
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, env=environment, **out) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def last_words(process: subprocess.Popen[str]) -> str:
    """What one has written that is of no use any more."""
    process.kill()
    return process.communicate()[0]
