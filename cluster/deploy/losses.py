"""What the terminal of `isotherm serve` says of workers that are lost: which, what is done about it, and when the
cluster is whole again. Read off the controller's operations, of which each recovery is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.operations import RECOVERY, Phase
from isotherm.cluster.messages.workers import ROLES, role_of


class Losses:
    """`pid_of`: the process of a worker, also of one that is gone; None where that is not known."""

    def __init__(self, pid_of: Callable[[str], int | None]) -> None:
        self._pid_of = pid_of
        self._told: set[str] = set()  # workers that are lost, and recoveries that have ended

    def lines(self, operations: Iterable[JSON]) -> list[str]:
        """What there is to say of the controller's operations, oldest first, that was not said before. Where `pid_of`
        raises, nothing of it counts as said."""
        said, before = [], set(self._told)
        try:
            for operation in operations:
                said += self._of(operation)
        except BaseException:
            self._told = before
            raise
        return said

    def _of(self, operation: JSON) -> list[str]:
        if operation["origin"] != RECOVERY:
            return []
        workers = operation["target"]["replace"]
        said = [
            f"{self._named(worker)} is lost; it is being replaced, and streams that need it wait"
            for worker in workers
            if self._is_new(worker)
        ]
        if Phase(operation["phase"]).is_final and self._is_new(operation["id"]):
            said.append(self._end(operation, ", ".join(workers)))
        return said

    def _is_new(self, name: str) -> bool:
        is_new = name not in self._told
        self._told.add(name)
        return is_new

    def _end(self, operation: JSON, lost: str) -> str:
        if Phase(operation["phase"]) is not Phase.DONE:
            reasons = "; ".join(operation["reasons"])
            return (
                f"{lost} could not be replaced ({reasons}); the others take over what they can, and it is tried again"
            )
        seconds = operation["entered"][Phase.DONE.value] - operation["created"]
        new = [step.removeprefix("start ") for step in operation["plan"] if step.startswith("start ")]
        if not new:
            return f"whole again after {seconds:.1f} s: the others have taken over what {lost} did"
        named = ", ".join(map(self._named, new))
        return f"whole again after {seconds:.1f} s: {named} in the place of {lost}"

    def _named(self, worker: str) -> str:
        pid = self._pid_of(worker)
        return f"{ROLES[role_of(worker)]} {worker}" + ("" if pid is None else f" (process {pid})")
