"""The thread in which a shard's engine runs: commands come in between steps, deltas go out after each."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from isotherm.actors.attention.engine import Engine
from isotherm.actors.pulse import Pulse
from isotherm.cluster.background import spawn_thread
from isotherm.cluster.engine.places import QueueFullError
from isotherm.cluster.errors import named_line, one_line
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest

log = logging.getLogger(__name__)
Command = Callable[[], list[Delta]]


class StepLoop:
    """`publish` is called on the loop's thread with the deltas of one step. An idle loop sleeps. `pulse` is the
    thread's; `vital`: the process is there for it, and ends with it. `ended` is called on the thread when it
    ends, for whatever reason.

    Each request that is submitted ends with one delta that has a finish reason, before anything comes of a later one
    with its id."""

    def __init__(
        self,
        engine: Engine,
        publish: Callable[[list[Delta]], None],
        pulse: Pulse | None = None,
        vital: bool = True,
        ended: Callable[[], None] = lambda: None,
    ):
        self.engine, self.pulse = engine, pulse or Pulse()
        self.pulse.prod = lambda: self._enqueue(list)
        self._publish, self._ended = publish, ended
        self._commands: deque[Command] = deque()
        self._preparing: dict[str, GenerationRequest] = {}  # by id, not in the engine yet; the loop's alone
        self._wake = threading.Condition()
        self._closed = False
        self.thread = spawn_thread("step loop", self._run, vital)

    def submit(self, request: GenerationRequest) -> None:
        self._enqueue(lambda: self._add(request))

    def abort(self, request_id: str) -> None:
        self._enqueue(lambda: self._abort(request_id))

    def give_back(self, request_id: str) -> None:
        """Take a request out of the engine, to be resubmitted elsewhere; its last delta says so."""
        self._enqueue(lambda: self._abort(request_id, FinishReason.MOVED))

    def between_steps(self, action: Callable[[], None]) -> None:
        """Run `action` on the loop's thread before its next step. One that fails is logged, and stops nothing."""

        def command() -> list[Delta]:
            try:
                action()
            except Exception:
                log.exception("an action between two steps failed")
            return []

        self._enqueue(command)

    def close(self) -> None:
        """End the thread after the step that it computes, whatever is left in the engine."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _enqueue(self, command: Command) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _add(self, request: GenerationRequest) -> list[Delta]:
        """Take a request. One of its id that is still here ends: it was submitted anew, to go on as this one."""
        deltas = self._abort(request.id)
        try:
            if request.params.constraint is not None and self.engine.prepare(request, lambda: self._prepared(request)):
                self._preparing[request.id] = request
                return deltas
        except Exception as error:
            return [*deltas, self._error(request, error)]
        return deltas + self._take(request)

    def _prepared(self, request: GenerationRequest) -> None:
        """What a request waited for is there; called in any thread."""

        def command() -> list[Delta]:
            if self._preparing.get(request.id) is not request:
                return []  # it was aborted meanwhile, or submitted anew
            del self._preparing[request.id]
            return self._take(request)

        self._enqueue(command)

    def _take(self, request: GenerationRequest) -> list[Delta]:
        try:
            self.engine.scheduler.add(request)
        except QueueFullError as error:
            return [Delta(request.id, 0, finish_reason=FinishReason.REFUSED, error=str(error))]
        except Exception as error:
            return [self._error(request, error)]
        return []

    def _error(self, request: GenerationRequest, error: Exception) -> Delta:
        """The end of a request that could not be queued; also by what nobody has thought of: it is this one's alone."""
        if not isinstance(error, ValueError):
            log.error("request %s could not be queued", request.id, exc_info=error)
        return Delta(request.id, len(request.generated), finish_reason=FinishReason.ERROR, error=one_line(error))

    def _abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> list[Delta]:
        known = self._preparing.pop(request_id, None) is not None or self.engine.scheduler.abort(request_id)
        return [Delta(request_id, 0, finish_reason=reason)] if known else []

    def _run(self) -> None:
        """An error that gets out of here ends the process: its requests go on at another shard, and it is replaced."""
        try:
            self._serve()
        finally:
            self._ended()

    def _serve(self) -> None:
        while True:
            with self._wake:
                idle = not self._commands and not len(self.engine.scheduler)
                while not self._commands and not len(self.engine.scheduler) and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                commands, self._commands = self._commands, deque()
            if idle:
                self.pulse.begin()
            deltas = [delta for command in commands for delta in command()]
            try:
                deltas += self.engine.step()
            except Exception as error:  # the step is lost: every request that was in the engine is told so
                log.exception("step failed")
                deltas += self.engine.take_unsent() + self._fail_all(named_line(error))
            self.pulse.beat()
            if deltas:
                self._publish(deltas)

    def _fail_all(self, message: str) -> list[Delta]:
        scheduler = self.engine.scheduler
        return [delta for request_id in scheduler.request_ids() for delta in scheduler.fail(request_id, message)]
