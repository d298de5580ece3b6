"""What attention shards and expert groups have in common as processes: identity, loading progress, links by
rendezvous."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from isotherm.actors.links.protocol import LinkEnd
from isotherm.actors.links.registry import own_locality
from isotherm.actors.models.weights import WeightReader, own_fingerprint, parse_dtype
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.logs import set_up_logs
from isotherm.cluster.messages.membership import SupersededError
from isotherm.cluster.messages.workers import Locality, WorkerSpec
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.fingerprint import Fingerprint
from isotherm.kernels.cpus import usable_cpus
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.ops import Kernels
from isotherm.kernels.select import select_kernels

# What a worker sets in its environment before anything else, where it is not set: libraries read it. With NCCL's
# default torch ends a process whose peer is lost; here the link handles that (actors/links/process_group.py).
ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


class WorkerBase:
    """Base of the two worker actors. Its methods are called by the controller; all are quick or run in a thread, so
    that a worker answers while it loads. What changes the worker is called through `order`."""

    def __init__(self, spec: WorkerSpec, host: str):
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Ray leaves the root logger to the process; one line per event, on stderr, goes into the worker's log file.
        set_up_logs(spec.id, spec.log_format, spec.log_level)
        self.spec, self.host = spec, host
        self.progress = 0.0
        self.loaded = False
        self._reader: WeightReader | None = None  # of the load under way
        self._reading_since = 0.0
        self.read_bytes, self.read_seconds = 0, 0.0  # of the last load
        self._fingerprint: Fingerprint | None = None
        self._obeys = 0  # generation of the newest controller that has given an order
        self.checkpoint, self.speculation = Checkpoint.open(spec.model_path).drafting(spec.speculation)
        cores = usable_cpus()
        self.threads = spec.threads or max(1, cores // spec.sharers)
        selection = select_kernels(spec.kernels, parse_dtype(spec.dtype), self.threads, spec.device, spec.isa)
        self.kernels: Kernels = selection.kernels
        self.kernels_reason = selection.reason
        # The groups of a node are rarely all busy: one that has much to read takes cores that others leave.
        most = self.threads if spec.threads else min(cores, 2 * self.threads)
        if most > self.threads and isinstance(self.kernels, NativeKernels):
            self.kernels.context.spread(most)
        logging.getLogger(__name__).info(
            "kernels: %s (%s), %d threads", self.kernels.name, selection.reason, self.threads
        )

    @contextmanager
    def _reading(self) -> Iterator[WeightReader]:
        """A reader of this worker's weights, whose bytes `_common_status` tells while it reads."""
        reader = WeightReader(self.checkpoint, self.spec.weights)
        self._reader, self._reading_since = reader, time.monotonic()
        try:
            with reader:
                yield reader
        finally:
            self.read_bytes, self.read_seconds = reader.bytes_read, time.monotonic() - self._reading_since
            self._reader = None

    def _read_so_far(self) -> tuple[int, float]:
        """Bytes of the checkpoint, and the seconds that reading, quantising and packing them took: of the load under
        way, or of the last one."""
        if (reader := self._reader) is None:
            return self.read_bytes, self.read_seconds
        return reader.bytes_read, time.monotonic() - self._reading_since

    def _set_progress(self, fraction: float) -> None:
        self.progress = fraction

    async def pid(self) -> int:
        return os.getpid()

    async def sign_of_life(self) -> None:
        """Return when every thread that does this worker's work has shown that it goes on; never where one hangs."""

    async def waits_for(self) -> tuple[str, float]:
        """The worker that the one who is asked waits for at this moment, and for how many seconds already; empty: for
        nobody."""
        return "", 0.0

    async def order(self, generation: int, name: str, *args: Any) -> Any:
        """Do `name(*args)` for the controller of this generation. Raises SupersededError for a controller that was
        taken for dead and is not, once a newer one has given an order."""
        if generation < self._obeys:
            raise SupersededError(f"{self.spec.id} obeys controller {self._obeys}, not {generation}: {name} is refused")
        self._obeys = generation
        return await getattr(self, name)(*args)

    async def sentinel(self) -> None:
        """Never returns: the caller learns of this process's death at once."""
        await asyncio.Event().wait()

    async def fingerprint(self) -> Fingerprint:
        """What decides the bits that it computes."""
        if self._fingerprint is None:
            self._fingerprint = await asyncio.to_thread(
                own_fingerprint, self.checkpoint, self.kernels, self.spec.weights, self.spec.kv_cache_dtype
            )
        return self._fingerprint

    async def locality(self) -> Locality:
        """Where this process is, for choosing its links."""
        if self.spec.device == "cpu":
            return own_locality()
        return replace(
            own_locality(), device=self.spec.device, gpu=str(torch.cuda.get_device_properties(self.kernels.device).uuid)
        )

    def link_end(self) -> LinkEnd:
        """This worker, as its links need to know it."""
        config, kernels = self.checkpoint.config, self.kernels
        return LinkEnd(
            host=self.host,
            device=kernels.device,
            dtype=kernels.dtype,
            width=config.hidden_size,
            top_k=config.num_experts_per_tok,
            timeout=self.spec.link_timeout,
        )

    def _common_status(self) -> JSON:
        read, seconds = self._read_so_far()
        return {
            "pid": os.getpid(),
            "host": self.host,
            "loaded": self.loaded,
            "progress": round(self.progress, 4),
            "read_bytes": read,
            "read_bytes_per_second": round(read / seconds) if seconds else 0,
            "kernels": self.kernels.name,
            "kernels_reason": self.kernels_reason,
            "fingerprint": None if self._fingerprint is None else self._fingerprint.digest,
            "threads": self.threads,
        }
