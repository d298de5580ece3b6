"""What workers say of themselves when they are asked: their status, their meters, their open requests. Nobody waits
long for one that does not answer, and not at all for one whose process is still starting."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from isotherm.cluster.errors import one_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.on_ray.workers import RayWorker, is_loss

log = logging.getLogger(__name__)
ANSWER_SECONDS = 5.0  # that a worker has to answer


class WorkerReports:
    """`dead`: worker → why; the fleet's own table. Dead workers are not asked."""

    def __init__(self, dead: Mapping[str, str]):
        self._dead = dead
        self._starting: set[str] = set()
        self._read: dict[str, int] = {}  # what `read` gave last

    @contextlib.contextmanager
    def starting(self, worker: str) -> Iterator[None]:
        """Until it has answered for the first time: Ray queues what is asked of an actor that is still being made.
        Raises WorkerGoneError where it is lost meanwhile: Ray says that an actor never ran, and not which."""
        self._starting.add(worker)
        try:
            yield
        except Exception as error:
            if not is_loss(error):
                raise
            raise WorkerGoneError(f"{worker} was lost while it started: {one_line(error)}") from None
        finally:
            self._starting.discard(worker)

    def answering(self, workers: Iterable[str]) -> list[str]:
        """Those that can be asked: alive, and started."""
        return [w for w in workers if w not in self._dead and w not in self._starting]

    async def ask(self, what: str, workers: Mapping[str, RayWorker], names: Iterable[str]) -> dict[str, Any]:
        """What those of the workers say that answer in time; about the others there is a line in the log."""
        calls = {name: asyncio.wait_for(workers[name].call(what), ANSWER_SECONDS) for name in self.answering(names)}
        answers = await asyncio.gather(*calls.values(), return_exceptions=True)
        out = {}
        for name, answer in zip(calls, answers, strict=True):
            if isinstance(answer, BaseException):
                log.warning("%s does not say its %s: %s", name, what, one_line(answer))
            else:
                out[name] = answer
        return out

    async def read(self, workers: Mapping[str, RayWorker], loading: Iterable[str]) -> tuple[dict[str, int], bool]:
        """The bytes that each of those has read which load and answer in time, and whether anything has come since this
        was asked last: who begins to load may read its first, and one whose disk hangs says the same again."""
        told = await self.ask("status", workers, loading)
        before, self._read = self._read, {name: status["read_bytes"] for name, status in told.items()}
        return self._read, bool(self._read.items() - before.items())

    async def status(self, role: str, worker: RayWorker) -> JSON:
        """Its own words with its `state`: starting, loading, loaded, silent or dead."""
        out = {
            "id": worker.id,
            "role": role,
            "pid": None,
            "node": worker.node_id,
            "placement_group": worker.placement_group_id,
        }
        if worker.id in self._dead:
            return out | {"state": "dead", "reason": self._dead[worker.id]}
        if worker.id in self._starting:
            return out | {"state": "starting", "reason": "its process is being started"}
        try:
            detail = await asyncio.wait_for(worker.call("status"), ANSWER_SECONDS)
        except asyncio.TimeoutError:
            return out | {"state": "silent", "reason": f"no answer for {ANSWER_SECONDS:g} s"}
        except WorkerGoneError as error:
            return out | {"state": "dead", "reason": one_line(error)}
        status: JSON = out | {"state": "loaded" if detail["loaded"] else "loading"} | detail
        return status
