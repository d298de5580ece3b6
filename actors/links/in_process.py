"""A link within one process: a function call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from isotherm.actors.links.protocol import Dispatch


class InProcessLink:
    """A function call to a worker in this process."""

    kind = "in-process"

    def __init__(self, compute: Callable[[Dispatch], Tensor]):
        self._compute = compute

    def send(self, message: Dispatch) -> None:
        self._message = message

    def receive(self, progress: Callable[[], None] = lambda: None) -> Tensor:
        return self._compute(self._message)

    def in_step(self, inside: bool) -> None:
        pass

    def close(self) -> None:
        pass
