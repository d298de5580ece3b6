"""Serves one group's experts to any number of links: a thread per link receives, one thread computes and replies."""

from __future__ import annotations

import logging
import queue
import time
from dataclasses import astuple, dataclass

from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.links.protocol import Dispatch, LinkError, ServerLink
from isotherm.actors.pulse import Pulse
from isotherm.cluster.background import spawn_thread

log = logging.getLogger(__name__)


@dataclass
class ServerCounts:
    """What `isotherm status` shows of a group."""

    messages: int = 0
    computations: int = 0  # fewer than messages where some were gathered
    gathered: int = 0  # messages that shared a computation
    pairs: int = 0
    refused: int = 0
    busy_seconds: float = 0.0
    held_seconds: float = 0.0  # in the gather window

    def __add__(self, other: ServerCounts) -> ServerCounts:
        return ServerCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class PythonLoop:
    def __init__(self, worker: ExpertWorker):
        self.worker = worker
        self.counts = ServerCounts()
        self._links: dict[str, ServerLink] = {}
        # None: give a sign of life
        self._inbox: queue.SimpleQueue[tuple[str, ServerLink, int, Dispatch] | None] = queue.SimpleQueue()
        self.pulse = Pulse(lambda: self._inbox.put(None))
        self.thread = spawn_thread("experts", self._compute)

    def links(self) -> dict[str, str]:
        """Shard → kind of link."""
        return {shard: link.kind for shard, link in self._links.copy().items()}

    def attach(self, shard: str, link: ServerLink) -> None:
        """Serve a link until its shard closes it or is lost. A new link of the same shard takes the place of the old
        one."""
        self._links[shard] = link
        spawn_thread(f"link {shard}", lambda: self._receive(shard, link), vital=False)

    def _receive(self, shard: str, link: ServerLink) -> None:
        try:
            while (message := link.receive()) is not None:
                self._inbox.put((shard, link, *message))
            log.info("link to %s closed", shard)
        except LinkError as error:
            log.warning("link to %s lost: %s", shard, error)
        finally:  # also where a message could not be understood: the shard has to learn that nobody listens any more
            self._detach(shard, link)

    def _detach(self, shard: str, link: ServerLink) -> None:
        if self._links.get(shard) is link:
            del self._links[shard]

    def _compute(self) -> None:
        while True:
            self._take()

    def _take(self) -> None:
        # A function of its own: a name in the loop would keep the link, and its memory, until the next message.
        work = self._inbox.get()
        self.pulse.begin()
        if work is not None:
            self._serve(*work)
            self.pulse.beat()

    def _serve(self, shard: str, link: ServerLink, sequence: int, message: Dispatch) -> None:
        begin = time.perf_counter()
        try:
            try:
                output = self.worker.compute(message)
            except Exception as error:  # told to the shard, which decides; this group goes on serving others
                log.exception("dispatch of %s failed", shard)
                self.counts.messages += 1
                self.counts.refused += 1
                link.refuse(sequence, error)
                return
            # Counted before it is answered, so that a shard that has its answer finds it counted.
            self.counts.messages += 1
            self.counts.computations += 1
            self.counts.pairs += len(message.rows_P)
            self.counts.busy_seconds += time.perf_counter() - begin
            link.reply(sequence, output)
        except Exception as error:
            log.warning("link to %s lost: %s", shard, error)
            self._detach(shard, link)
