"""Has Serve run the ingress, at the start and when it is replaced, and says why where its replicas cannot start."""

from __future__ import annotations

from ray import serve
from ray.exceptions import RayError

from isotherm.cluster.api.access.key_store import KeySource
from isotherm.cluster.deploy.ingress import NAME, ingress_application
from isotherm.cluster.errors import one_line
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.supervise.supervisor import ServeError

APPLICATION = "isotherm"


def run_ingress(manifest: Manifest, keys: KeySource | None) -> None:
    """Until its replicas take requests. Raises ServeError where they cannot start."""
    try:
        serve.run(ingress_application(manifest, keys), name=APPLICATION, route_prefix="/")
    except (RuntimeError, RayError) as error:
        # Serve's own error names the deployment alone.
        application = serve.status().applications.get(APPLICATION)
        ingress = None if application is None else application.deployments.get(NAME)
        raise ServeError(one_line(error) if ingress is None else said_by_replica(ingress.message)) from None


def said_by_replica(message: str) -> str:
    """What went wrong, of Serve's account of it: its own words, and then the replica's traceback."""
    said = one_line(ServeError(message.partition("Error:\n")[2] or message))
    return said.partition(": ")[2] if said.startswith("isotherm.") else said  # without the name of an error's class
