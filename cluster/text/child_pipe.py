"""Frames to a child process and back, in bounded time: a child that was stopped is not waited for."""

from __future__ import annotations

import os
import select
import subprocess
import time

from isotherm.cluster.text.template_child import FRAME


def ask(child: subprocess.Popen[bytes], payload: bytes, seconds: float) -> bytes:
    """The child's answer to one frame. Raises EOFError or BrokenPipeError where it has ended, TimeoutError where it has
    not taken the frame and answered in time."""
    assert child.stdout is not None
    deadline = time.monotonic() + seconds
    send(child, payload, seconds)
    (size,) = FRAME.unpack(_read(child.stdout.fileno(), FRAME.size, deadline))
    return _read(child.stdout.fileno(), size, deadline)


def send(child: subprocess.Popen[bytes], payload: bytes, seconds: float) -> None:
    """One frame. The pipes must have no buffers of their own, and the one to the child must not block. Raises
    BrokenPipeError, TimeoutError."""
    assert child.stdin is not None
    deadline = time.monotonic() + seconds
    left = memoryview(FRAME.pack(len(payload)) + payload)
    while left:
        _wait(child.stdin.fileno(), select.POLLOUT, deadline)
        left = left[os.write(child.stdin.fileno(), left) :]


def _read(pipe: int, size: int, deadline: float) -> bytes:
    parts: list[bytes] = []
    while size:
        _wait(pipe, select.POLLIN, deadline)
        if not (part := os.read(pipe, size)):
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _wait(pipe: int, event: int, deadline: float) -> None:
    """Until something can be done with the pipe; its other end's being closed counts."""
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
