"""What `isotherm serve` does when something dies, hangs or is asked to end: events in, instructions out. Without Ray,
processes, signals or clocks.

The process that a user starts (cluster/supervise/supervisor.py) holds no Ray: it watches the one that does, the driver
(cluster/deploy/serve.py), and Ray's own, and ends them all, whatever state they are in.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Without one of these nothing serves; Ray itself ends the node when one of its agents has ended. The others serve
# nothing that tokens need.
VITAL = ("raylet", "gcs_server", "dashboard agent", "runtime env agent")
LOSSES = {
    "dashboard": "`ray job submit` and Ray's dashboard are gone until the next start",
    "log_monitor": "Ray's logs are no longer gathered",
    "monitor": "Ray's node autoscaler is gone until the next start",
}
REFUSED_SECONDS = 20.0  # Serve starts a killed proxy again within a few seconds
LOOK_SECONDS = 0.5  # while nothing listens, from one look of the driver's at Serve's proxy to the next
SILENT_SECONDS = 90.0  # a port that is there and answers nothing; longer than a burst or a pause of the machine
DRAIN_MARGIN = 20.0  # seconds beyond the drain's own in which the driver says that it is over
# From the end of the drain until Ray is down: more than the limits of cluster/deploy/serve.py together.
STOP_SECONDS = 45.0
ECHO_SECONDS = 1.0  # a terminal and a shell may both pass one event on: within so many seconds it is one signal


class Phase(enum.Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"  # open requests finish, new ones are refused
    STOPPING = "stopping"  # workers and Ray go
    ENDED = "ended"


class Answer(enum.Enum):
    """What came of a request to the port."""

    GIVEN = "given"
    REFUSED = "refused"
    SILENT = "silent"


@dataclass(frozen=True)
class Say:
    line: str


@dataclass(frozen=True)
class Tell:
    """To the driver: "drain", or "stop" without a drain; "look" whether Serve still has its proxy."""

    word: str


@dataclass(frozen=True)
class End:
    """End everything that is left, by force, and this process with `status`. `patience`: seconds in which it may still
    end by itself."""

    status: int
    reason: str = ""  # of a status other than 0
    patience: float = 0.0
    logs: bool = True  # whether Ray's logs may say more about the reason


Instruction = Say | Tell | End


class Watchdog:
    """Times are seconds on one clock, given with each event."""

    def __init__(self, drain_seconds: float, own_ray: bool):
        """`own_ray`: Ray is started for this service, so that ending its processes ends all of it."""
        self.phase = Phase.STARTING
        self._drain_seconds, self._own_ray = drain_seconds, own_ray
        self._signalled: float | None = None
        self._deadline: float | None = None
        self._unanswered: dict[Answer, float] = {}  # since when
        self._looked = -LOOK_SECONDS  # when the driver was last told to
        self._failure, self._logs = "", True

    def on_signal(self, now: float, number: int) -> Sequence[Instruction]:
        first = self._signalled
        self._signalled = now if first is None else first
        if self.phase in (Phase.DRAINING, Phase.STOPPING) and first is not None:
            # A terminal that goes sends SIGHUP, and its shell once more.
            if number == signal.SIGHUP or now - first < ECHO_SECONDS:
                return []
            return self._end(End(128 + number, f"ended at once by a second signal ({signal.Signals(number).name})"))
        if self.phase is Phase.STARTING:
            if self._own_ray:
                return [Say("stopping"), *self._end(End(0))]
            self._to(Phase.STOPPING, now + STOP_SECONDS)
            return [Say("stopping"), Tell("stop")]
        if self.phase is Phase.SERVING:
            return [self._drain(now), Tell("drain")]
        return []

    def on_message(self, now: float, message: Mapping[str, object]) -> Sequence[Instruction]:
        """What the driver says: that it serves, drains (it was asked to by `isotherm stop`), stops, or has failed."""
        event = message.get("event")
        if event == "serving" and self.phase is Phase.STARTING:
            self._to(Phase.SERVING, None)
        elif event == "draining" and self.phase in (Phase.STARTING, Phase.SERVING):
            return [self._drain(now)]
        elif event == "stopping" and self.phase is not Phase.ENDED:
            self._to(Phase.STOPPING, now + STOP_SECONDS)
        elif event == "failed":
            self._failure, self._logs = str(message.get("reason", "")), bool(message.get("logs", True))
            self._to(Phase.STOPPING, now + STOP_SECONDS)
        return []

    def on_driver_end(self, status: int) -> Sequence[Instruction]:
        """`status`: minus a signal's number where one has ended it."""
        if self.phase is Phase.ENDED:
            return []
        if self._failure:
            return self._end(End(1, self._failure, patience=2.0, logs=self._logs))
        if status == 0 and self.phase is Phase.STOPPING:
            return self._end(End(0, patience=3.0))
        how = f"was ended by signal {-status}" if status < 0 else f"has ended with status {status}"
        return self._end(End(1, f"the process that drives Ray {how}"))

    def on_process_end(self, name: str, pid: int) -> Sequence[Instruction]:
        """One of Ray's own processes has ended."""
        if self.phase in (Phase.STOPPING, Phase.ENDED):
            return []
        if name in VITAL:
            return self._end(
                End(
                    1,
                    f"Ray's {name} (process {pid}) has ended, and nothing can be served without it; "
                    "start again: isotherm serve",
                )
            )
        return [Say(f"Ray's {name} (process {pid}) has ended: {LOSSES.get(name, 'it is not needed to serve')}")]

    def on_answer(self, now: float, answer: Answer, url: str) -> Sequence[Instruction]:
        """What came of a request to the front door's port, sent while it serves."""
        if self.phase is not Phase.SERVING or answer is Answer.GIVEN:
            self._unanswered.clear()
            return []
        for other in {Answer.REFUSED, Answer.SILENT} - {answer}:
            self._unanswered.pop(other, None)
        waited = now - self._unanswered.setdefault(answer, now)
        limit, words = (
            (REFUSED_SECONDS, "nothing listens at")
            if answer is Answer.REFUSED
            else (SILENT_SECONDS, "no request is answered at")
        )
        if waited >= limit:
            return self._end(End(1, f"{words} {url}, for {waited:.0f} s now"))
        if answer is Answer.REFUSED and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            return [Tell("look")]
        return []

    def on_time(self, now: float) -> Sequence[Instruction]:
        if self._deadline is None or now < self._deadline:
            return []
        what = "the drain" if self.phase is Phase.DRAINING else "stopping"
        return self._end(End(1, self._failure or f"{what} took too long; what was left has been ended by force"))

    def _drain(self, now: float) -> Say:
        self._to(Phase.DRAINING, now + self._drain_seconds + DRAIN_MARGIN)
        return Say(
            f"stopping; open requests have {self._drain_seconds:g} s to finish, a second signal ends them at once"
        )

    def _to(self, phase: Phase, deadline: float | None) -> None:
        self.phase, self._deadline = phase, deadline

    def _end(self, end: End) -> list[Instruction]:
        self._to(Phase.ENDED, None)
        return [end]
