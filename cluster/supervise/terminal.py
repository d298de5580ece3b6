"""What is printed on a terminal that may go away."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class LastingStream:
    """Standard output or error whose end is no error: what nobody can read any more is thrown away."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:  # EIO: the terminal is gone; EPIPE: the reader of a pipe
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        """Python writes out what is left in its buffer once more when it ends, and would say that it cannot."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def outlast_terminal() -> None:
    """For this process's standard output and error; one that it was started without stays away."""
    for number in range(3):
        _occupy(number)
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            setattr(sys, name, LastingStream(stream))


def _occupy(number: int) -> None:
    """A standard stream that was closed leads nowhere from now on: else the next pipe of ours could have its number,
    and a process that is started here would take that for its output."""
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere == number:
            os.set_inheritable(number, True)
        else:
            os.dup2(nowhere, number)
            os.close(nowhere)
