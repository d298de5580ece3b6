"""The thread in which a shard's engine runs: commands come in between steps, deltas go out after each."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from isotherm.actors.engine import Engine
from isotherm.cluster.requests import Delta, FinishReason, GenerationRequest
from isotherm.cluster.scheduler import QueueFullError

log = logging.getLogger(__name__)


class StepLoop:
    """`publish` is called on the loop's thread with the deltas of one step. An idle loop sleeps."""

    def __init__(self, engine: Engine, publish: Callable[[list[Delta]], None]):
        self.engine = engine
        self._publish = publish
        self._commands: deque[Callable[[], list[Delta]]] = deque()
        self._wake = threading.Condition()
        threading.Thread(target=self._run, name="step loop", daemon=True).start()

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

    def _enqueue(self, command: Callable[[], list[Delta]]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _add(self, request: GenerationRequest) -> list[Delta]:
        try:
            self.engine.scheduler.add(request)
        except QueueFullError as error:
            return [Delta(request.id, 0, finish_reason=FinishReason.REFUSED, error=str(error))]
        except ValueError as error:
            return [Delta(request.id, len(request.generated), finish_reason=FinishReason.ERROR, error=str(error))]
        return []

    def _abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> list[Delta]:
        return [Delta(request_id, 0, finish_reason=reason)] if self.engine.scheduler.abort(request_id) else []

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._commands and not len(self.engine.scheduler):
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
            deltas = [delta for command in commands for delta in command()]
            try:
                deltas += self.engine.step()
            except Exception as error:  # the step is lost: every request that was in the engine is told so
                log.exception("step failed")
                deltas += self._fail_all(f"{type(error).__name__}: {error}")
            if deltas:
                self._publish(deltas)

    def _fail_all(self, message: str) -> list[Delta]:
        scheduler = self.engine.scheduler
        return [Delta(i, 0, finish_reason=FinishReason.ERROR, error=message) for i in scheduler.request_ids() if scheduler.abort(i)]
