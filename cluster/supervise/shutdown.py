"""Steps of a shutdown, each with a limit: one that hangs or fails keeps no other from being done. Knows nothing about
what is shut down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isotherm.cluster.background import spawn_thread
from isotherm.cluster.errors import one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float
    work: Callable[[], None]


def carry_out(steps: Sequence[Step]) -> list[str]:
    """In order. Gives what went wrong, a line each: a step that fails, or is not done in its time and goes on in a
    thread that nobody waits for."""
    troubles = []
    for step in steps:
        done: list[BaseException | None] = []

        def run(step: Step = step, done: list[BaseException | None] = done) -> None:
            try:
                step.work()
            except BaseException as error:
                done.append(error)
            else:
                done.append(None)

        spawn_thread(step.name, run, vital=False).join(step.seconds)
        if not done:
            troubles.append(f"{step.name}: not done in {step.seconds:g} s")
        elif done[0] is not None:
            troubles.append(f"{step.name}: {one_line(done[0])}")
    for trouble in troubles:
        log.warning("%s", trouble)
    return troubles
