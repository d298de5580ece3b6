"""A revision: the workers that have one model and one manifest's values, and what is decided about them. There is one,
but while another is rolled out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from isotherm.cluster.control.planner import Desired
from isotherm.cluster.control.reconfigurer import Reconfigurer
from isotherm.cluster.control.saved_state import SavedRevision
from isotherm.cluster.control.startup import start_fleet
from isotherm.cluster.deploy.fleet import RayFleet
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.messages.operations import OperationLog
from isotherm.cluster.model.checkpoint import Checkpoint


class Revision:
    """Links, placements, deaths and replacements are its own: its fleet knows of no other's workers."""

    def __init__(
        self,
        number: int,
        manifest: Manifest,
        checkpoint: Checkpoint,
        fleet: RayFleet,
        operations: OperationLog,
        changed: Callable[[], None],
        save: Callable[[], None],
    ):
        self.number, self.manifest, self.checkpoint, self.fleet = number, manifest, checkpoint, fleet
        limits = manifest.scheduler_config(checkpoint.config).limits
        self.limits = replace(limits, hangs_after=manifest.liveness.timeout)
        self.reconfigurer = Reconfigurer(fleet, operations, changed, save)

    async def start(self, planned: Desired, phase: Callable[[str], None]) -> None:
        """Start the workers that are planned, from nothing; raises what went wrong, when none of them is left."""
        self.fleet.avoid = planned.drained
        await start_fleet(self.fleet, planned.shards, planned.groups, planned.placement, phase)
        self.reconfigurer.desired = planned

    def saved(self) -> SavedRevision:
        numerics, values = self.fleet.numerics.dump(), self.manifest.model_dump_json()
        return SavedRevision(self.number, str(self.checkpoint.path), self.reconfigurer.desired, numerics, values)

    def find(self, saved: SavedRevision) -> list[str]:
        """Take its workers over from a controller that has died. Gives the names of workers found that are others'."""
        fleet, desired = self.fleet, saved.desired
        found = fleet.find(desired)
        fleet.numerics.restore(saved.numerics)
        self.reconfigurer.desired = desired
        return found

    def as_dict(self) -> JSON:
        """For `isotherm status`."""
        return {
            "revision": self.number,
            "path": str(self.checkpoint.path),
            "system_fingerprint": self.fleet.numerics.system_fingerprint,
        }

    async def statuses(self) -> list[JSON]:
        return [worker | {"revision": self.number} for worker in await self.fleet.statuses()]
