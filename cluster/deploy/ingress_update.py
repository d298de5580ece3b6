"""Replaces the ingress replicas of a cluster that serves by new ones: with the code that is installed now, and with the
values that a manifest has for the front door. Streams finish at the replicas where they began."""

from __future__ import annotations

import logging

import ray

from isotherm.cluster.api.access.key_store import KeySource
from isotherm.cluster.deploy.ingress_start import run_ingress
from isotherm.cluster.deploy.rolled_values import By, Change, still_differing
from isotherm.cluster.manifest import Manifest, ManifestError
from isotherm.cluster.on_ray.session import ask_controller, attach, running_controller
from isotherm.cluster.supervise.supervisor import ServeError


def beside_the_front_door(
    running: Manifest, wanted: Manifest, now: Manifest | None = None, model: bool = False
) -> list[Change]:
    """What else is different than values that the front door alone depends on; `model`: the model's name too. `running`
    and `now` as `still_differing` has them."""
    others = {By.WORKERS, By.SCALE, By.NOTHING} | ({By.MODEL} if model else set())
    return [change for change in still_differing(running, now or running, wanted) if change.by in others]


def check_front_door(running: Manifest, wanted: Manifest, now: Manifest | None = None) -> None:
    """Whether the front door alone is to be another. Raises ManifestError."""
    if differing := beside_the_front_door(running, wanted, now):
        raise ManifestError(
            f"an update of the ingress changes the front door alone, but {'; '.join(c.otherwise for c in differing)}"
        )


def update_ingress(address: str | None, manifest: Manifest | None) -> int:
    """Without a manifest the front door's values stay as they are. Returns how many replicas were replaced, when the
    new ones serve and the old ones have finished what they had. Raises NoClusterError, ManifestError; ServeError where
    new replicas cannot start, and then the old ones serve on."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    attach(address)
    try:
        controller = running_controller()
        if ask_controller(controller, "owner") is None:
            raise ServeError("this cluster belongs to a RayService: change its serveConfigV2, which does the same")
        running: Manifest
        keys: KeySource | None
        running, keys = ask_controller(controller, "front_door")
        wanted = running if manifest is None else manifest.model_copy(update={"model": running.model})
        check_front_door(running, wanted, now=ask_controller(controller, "served")[1])
        try:
            run_ingress(wanted, keys)
        except ServeError as error:
            raise ServeError(f"the new ingress replicas cannot start, the old ones serve on: {error}") from None
        ask_controller(controller, "take_front_door", wanted)
        return wanted.http.replicas
    finally:
        ray.shutdown()
