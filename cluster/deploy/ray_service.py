"""Isotherm as KubeRay starts it: a RayService's serveConfigV2 names `application` here, Serve builds the ingress with
it, and the controller and its workers stay outside Serve, where no replica update can drop their weights."""

# No `from __future__ import annotations`: Serve looks at the class in the builder's signature.
from pathlib import Path

import ray
from pydantic import BaseModel, ConfigDict
from ray.serve import Application

from isotherm.cluster.api.access.key_store import KeySource
from isotherm.cluster.deploy.front_door_keys import MAKE_KEYS, check_bound
from isotherm.cluster.deploy.ingress import ingress_application
from isotherm.cluster.deploy.ingress_update import beside_the_front_door
from isotherm.cluster.deploy.preflight import check_servable
from isotherm.cluster.deploy.serve import start_controller
from isotherm.cluster.manifest import Manifest, load_manifest
from isotherm.cluster.model.path import resolve_model
from isotherm.cluster.on_ray.controller_process import find_controller
from isotherm.cluster.supervise.supervisor import ServeError


class Arguments(BaseModel):
    """`args` of the application in serveConfigV2."""

    model_config = ConfigDict(extra="forbid")

    manifest: str  # path of the cluster manifest, mounted in every pod


def application(args: Arguments) -> Application:
    """Find the controller of this Ray cluster, or start it, and bind the ingress. Serve runs this in a task of its own,
    again at every change of serveConfigV2. Raises ServeError where the workers that run were started from another
    manifest, or where there are no keys, KeysFileError, and what `check_servable` raises; Serve shows the message and
    keeps the ingress that it has."""
    manifest = load_manifest(Path(args.manifest))
    path = resolve_model(manifest.model)
    check_servable(manifest, path)
    if manifest.http.keys is None:  # whatever its http.host says: serveConfigV2 says where Serve listens
        raise ServeError(f"{args.manifest}: a RayService is reached by others, so it needs http.keys; {MAKE_KEYS}")
    keys = KeySource(Path(manifest.http.keys))
    check_bound(manifest.http.host, keys)
    try:
        controller = find_controller()
    except ValueError:
        controller = start_controller(manifest, path, keys, owner=None)
    running: Manifest
    now: Manifest
    running, now = ray.get(controller.served.remote())
    if differing := beside_the_front_door(running, manifest, now, model=True):
        raise ServeError(
            f"{args.manifest} is not what the workers that run have: {'; '.join(map(str, differing))}. "
            "`isotherm roll --manifest` gives them its values; a new RayCluster takes up the rest "
            "(upgradeStrategy NewCluster), or delete the RayService and apply it again"
        )
    ray.get(controller.begin.remote())
    return ingress_application(manifest, keys)
