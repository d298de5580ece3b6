"""Where workers are started: places that Ray has reserved for them, off the nodes that are avoided or suspect."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import ray

from isotherm.cluster.background import Background
from isotherm.cluster.errors import one_line
from isotherm.cluster.manifest import AttentionSection, ExpertSection, Manifest
from isotherm.cluster.messages.workers import EXPERT, role_of
from isotherm.cluster.on_ray.workers import Slot, release_slot, reserve

log = logging.getLogger(__name__)
PLACE_TIMEOUT = 2.0  # seconds after which a worker that Ray cannot place is reported
SUSPECT_PATIENCE = 2.0  # seconds in which there must be a place on another node than a suspect one
# For which nothing new is started on a node whose worker hung or could not be reached, if there are others
SUSPECT_SECONDS = 60.0


def resources(manifest: Manifest, worker: str) -> dict[str, float]:
    """Ray resources of one worker; zero entries are left out, as Ray wants it."""
    section = _section(manifest, worker)
    amounts = (("CPU", section.cpus), ("GPU", section.gpus), ("memory", section.memory))
    return {name: amount for name, amount in amounts if amount}


def _section(manifest: Manifest, worker: str) -> AttentionSection | ExpertSection:
    return manifest.experts if role_of(worker) == EXPERT else manifest.attention


class Places:
    """The places of workers that are to be started. The names of their placement groups begin with `prefix`. `changed`
    is called when the waits have changed; `standing` before and after a place is reserved: it raises where this is not
    the newest controller."""

    def __init__(
        self, prefix: str, manifest: Manifest, changed: Callable[[], None], standing: Callable[[], None]
    ) -> None:
        self.prefix = prefix
        self.waits: dict[str, str] = {}  # worker → the resources that it waits for, in words
        self._manifest, self._changed, self._standing = manifest, changed, standing
        self._slots: dict[str, Slot] = {}  # reserved, by worker
        self._suspects: dict[str, float] = {}  # node → until when nothing is started there
        self._background = Background()

    def resources(self, worker: str) -> dict[str, float]:
        return resources(self._manifest, worker)

    async def reserve(self, worker: str, avoid: frozenset[str]) -> None:
        """Wait for a place, on none of the nodes in `avoid`, and keep it for the worker."""
        self._slots[worker] = await self._place(worker, avoid)

    async def take(self, worker: str, avoid: frozenset[str]) -> Slot:
        """The place that was reserved for the worker, which is its own from now on; else one off `avoid`."""
        return self._slots.pop(worker, None) or await self._place(worker, avoid)

    def release(self, worker: str) -> None:
        if (slot := self._slots.pop(worker, None)) is not None:
            self._give_back(worker, slot)

    def release_all(self) -> None:
        for worker in list(self._slots):
            self.release(worker)

    def nodes_of_groups(self) -> list[str]:
        """The node of each place that is reserved for an expert group."""
        return [slot.node_id for worker, slot in self._slots.items() if role_of(worker) == EXPERT]

    def suspect(self, node: str) -> None:
        """Start nothing there for a while, if there are other nodes."""
        self._suspects[node] = time.monotonic() + SUSPECT_SECONDS

    async def _place(self, name: str, avoid: frozenset[str]) -> Slot:
        """Off the nodes in `avoid`, and off suspect ones too where there is room elsewhere; the last one to come under
        suspicion before the others."""
        all_of_them = self.suspected(avoid)
        newest = frozenset(sorted(all_of_them, key=lambda node: self._suspects[node])[-1:])
        for suspects in filter(None, dict.fromkeys((all_of_them, newest))):
            try:
                return await asyncio.wait_for(self._place_off(name, avoid | suspects), SUSPECT_PATIENCE)
            except asyncio.TimeoutError:
                log.warning("%s finds no place off the suspect nodes %s", name, ", ".join(sorted(suspects)))
        return await self._place_off(name, avoid)

    async def _place_off(self, name: str, avoid: frozenset[str]) -> Slot:
        resources, labels = self.resources(name), _section(self._manifest, name).labels
        if avoid:
            labels = labels | {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}
        self._standing()
        pending = asyncio.ensure_future(reserve(self.prefix + name, resources, labels))
        try:
            done, _ = await asyncio.wait([pending], timeout=PLACE_TIMEOUT)
            if not done:
                await self._tell_wait(name, resources, labels)
            slot = await pending
            self._standing()
            return slot
        except BaseException:
            # The placement group of a caller that gave up is removed, also where Ray has placed it in that instant.
            pending.add_done_callback(lambda _: self._unwanted(name, pending))
            pending.cancel()
            await asyncio.wait([pending])
            raise
        finally:
            if self.waits.pop(name, None) is not None:
                self._changed()

    async def _tell_wait(self, name: str, resources: dict[str, float], labels: dict[str, str]) -> None:
        waits = f"{name} waits for a node with {_amounts(resources)}" + (f" and the labels {labels}" if labels else "")
        available = await asyncio.to_thread(ray.available_resources)
        log.warning("%s; free in the whole cluster: %s", waits, available)
        self.waits[name] = (
            f"{waits}; free in the whole cluster: {_amounts({r: available.get(r, 0.0) for r in resources})}"
        )
        self._changed()

    def _unwanted(self, name: str, pending: asyncio.Future[Slot]) -> None:
        if pending.cancelled():
            return
        if (error := pending.exception()) is None:
            self._give_back(name, pending.result())
        else:
            log.warning("%s gets no place: %s", name, one_line(error))

    def _give_back(self, name: str, slot: Slot) -> None:
        """Again and again where Ray's head is away."""
        try:
            release_slot(slot)
        except Exception as error:
            log.warning("the place of %s is given back later: %s", name, one_line(error))
            self._background.keep(f"giving back the place of {name}", lambda: asyncio.to_thread(release_slot, slot))

    def suspected(self, avoid: frozenset[str]) -> frozenset[str]:
        """Nodes on which nothing is to be started for now, as long as others are left."""
        now = time.monotonic()
        self._suspects = {node: until for node, until in self._suspects.items() if until > now}
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if self._suspects else set()
        return frozenset(self._suspects) if alive - avoid - set(self._suspects) else frozenset()


def _amounts(resources: dict[str, float]) -> str:
    """{"CPU": 2.0, "memory": 1e9} → "2 CPU, 1e+09 memory"."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "any resources"
