"""Has Serve run the ingress, at the start and when it is replaced, and says why where its replicas cannot start."""

from __future__ import annotations

import time

from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentStatus, DeploymentStatusTrigger
from ray.serve.context import _get_global_client
from ray.serve.schema import DeploymentStatusOverview

from isotherm.cluster.api.access.key_store import KeySource
from isotherm.cluster.deploy.front_door_keys import check_bound
from isotherm.cluster.deploy.ingress import NAME, ingress_application
from isotherm.cluster.errors import one_line, without_class
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.supervise.supervisor import ServeError

APPLICATION = "isotherm"
CANNOT_LISTEN = "Failed to bind to address"  # ray/serve/_private/http_util.py
LOST_SECONDS = 120.0  # after a loss while replicas start, until all of them are there
_LOOK_SECONDS = 0.2  # from one look whether they are to the next


def start_ingress(manifest: Manifest, keys: KeySource | None) -> None:
    """Serve and its ingress, until it takes requests. Raises ManifestError where Serve, which may have been there
    before, listens where it must not without keys, and ServeError where it cannot listen or its replicas cannot
    start."""
    options: JSON = {"host": manifest.http.host, "port": manifest.http.port}
    if (tls := manifest.http.tls) is not None:
        options |= {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
    try:
        serve.start(http_options=options)
        client = _get_global_client()
        assert client is not None  # it would have raised
        check_bound(client.http_config.host, keys)
        run_ingress(manifest, keys)
    except (RuntimeError, RayError) as error:
        if CANNOT_LISTEN not in str(error):
            raise
        where = one_line(error).partition(CANNOT_LISTEN)[2].strip(" '.")
        raise ServeError(
            f"Ray Serve cannot listen on {where}, where something else does, on this machine or on another of its Ray. "
            "Choose another port with --port, or http.port in the manifest"
        ) from None


def run_ingress(manifest: Manifest, keys: KeySource | None) -> None:
    """Until its replicas take requests; one that is lost before all of them do is replaced. Raises ServeError where
    they cannot start."""
    try:
        serve.run(ingress_application(manifest, keys), name=APPLICATION, route_prefix="/")
    except (RuntimeError, RayError) as error:
        ingress = _once_replaced()
        if ingress is None or ingress.status is not DeploymentStatus.HEALTHY:
            # Serve's own error names the deployment alone.
            raise ServeError(one_line(error) if ingress is None else said_by_replica(ingress.message)) from None
        client = _get_global_client()
        assert client is not None  # it would have raised
        client.wait_for_proxies_serving()  # what Serve does last of all, where nothing is lost


def _once_replaced() -> DeploymentStatusOverview | None:
    """What Serve says of the ingress when it replaces no lost replica, or LOST_SECONDS are over. Where one is lost
    before all have started, Serve says that the deployment has failed, and goes on with it."""
    deadline = time.monotonic() + LOST_SECONDS
    while True:
        application = serve.status().applications.get(APPLICATION)
        ingress = None if application is None else application.deployments.get(NAME)
        if ingress is None or ingress.status is DeploymentStatus.HEALTHY:
            return ingress
        if ingress.status_trigger is not DeploymentStatusTrigger.HEALTH_CHECK_FAILED or time.monotonic() > deadline:
            return ingress
        time.sleep(_LOOK_SECONDS)


def said_by_replica(message: str) -> str:
    """What went wrong, of Serve's account of it: its own words, and then the replica's traceback."""
    return without_class(one_line(ServeError(message.partition("Error:\n")[2] or message)))
