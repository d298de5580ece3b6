"""Serves one group's experts over links in shared memory by the native loop: no Python between receive and reply, and a
gather window."""

from __future__ import annotations

import logging
import threading
import time

from isotherm.actors.experts.python_loop import ServerCounts
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.links.protocol import DTYPES, PeerDescriptors
from isotherm.actors.links.shared_memory import KIND
from isotherm.actors.pulse import ALLOWED, felt
from isotherm.cluster.background import spawn_thread
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.native.ring import LoopEvent, NativeExpertLoop, NativeGate, ServedExperts
from isotherm.kernels.native.weights import NativeExpertBank

log = logging.getLogger(__name__)


class NativeLoop:
    """Needs native kernels, and a worker whose gate is a NativeGate. `window`: how long a message is held for other
    busy shards, in multiples of the time that a layer takes; 0: never."""

    def __init__(self, worker: ExpertWorker, window: float):
        kernels, bank, gate = worker.kernels, worker.bank, worker.gate
        if not (
            isinstance(kernels, NativeKernels) and isinstance(bank, NativeExpertBank) and isinstance(gate, NativeGate)
        ):
            raise TypeError(
                f"the native loop needs native kernels and gate, not {kernels.name} and {type(gate).__name__}"
            )
        first_layer = min(worker.config.moe_layers, default=0)
        self.worker = worker
        self._loop = NativeExpertLoop(
            kernels,
            ServedExperts(bank, gate, worker.slot_of, worker.rows_served, first_layer),
            dtype=DTYPES.index(kernels.dtype),
            window=window,
        )
        self._shards: dict[int, str] = {}  # by the link's number
        self._lock = threading.Lock()  # of _shards
        self._events = spawn_thread("expert loop events", self._tell)

    @property
    def bell(self) -> int:
        """The file that shards are given to ring."""
        return self._loop.bell

    @property
    def counts(self) -> ServerCounts:
        c = self._loop.counts()
        return ServerCounts(
            messages=c.messages,
            computations=c.computations,
            gathered=c.gathered,
            pairs=c.pairs,
            refused=c.refused,
            busy_seconds=c.busy_ns / 1e9,
            held_seconds=c.held_ns / 1e9,
        )

    @property
    def thread(self) -> int:
        """The system's id of the native thread."""
        return self._loop.counts().thread

    async def felt(self) -> None:
        """A sign of life of the native thread, as `felt` of actors/pulse.py says."""

        def may_take_longer() -> bool:
            c = self._loop.counts()
            return c.began_ns > 0 and time.monotonic_ns() - c.began_ns < ALLOWED * c.longest_ns

        await felt(lambda: self._loop.counts().beats, self._loop.prod, may_take_longer)

    def links(self) -> dict[str, str]:
        """Shard → kind of link."""
        with self._lock:
            return dict.fromkeys(self._shards.values(), KIND)

    def attach(self, shard: str, peer: PeerDescriptors) -> None:
        """Serve a link until its shard closes it or is lost. A new link of the same shard takes the place of the old
        one."""
        with self._lock:
            old = [number for number, name in self._shards.items() if name == shard]
            try:
                self._shards[self._loop.attach(peer.file, peer.socket)] = shard
            except OSError:
                peer.close()
                raise
            for number in old:
                del self._shards[number]
                self._loop.detach(number)

    def close(self) -> None:
        """End the loop and its links, after the computation under way."""
        self._loop.close()
        self._events.join()

    def _tell(self) -> None:
        while (event := self._loop.next_event()) is not None:
            number, what, words = event
            with self._lock:
                shard = (
                    self._shards.get(number, "a shard that has a newer link")
                    if what == LoopEvent.REFUSED
                    else self._shards.pop(number, None)
                )
            if what == LoopEvent.REFUSED:
                log.error("dispatch of %s failed: %s", shard, words)
            elif what == LoopEvent.CLOSED:
                log.info("link to %s closed", shard)
            else:
                log.warning("link to %s lost: %s", shard, words)
