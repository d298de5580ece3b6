"""What Serve is told of the ingress, of its manifest. No Ray: a deployment is only written down here."""

from __future__ import annotations

from typing import Any

import pytest

from isotherm.cluster.deploy.ingress import KILL_SECONDS, ingress_application
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.on_ray.controller_process import ON_HEAD


def deployed(**http: Any) -> Any:
    """The deployment of an ingress with this section of its manifest."""
    return ingress_application(parse_manifest({"http": http}), None)._bound_deployment


def test_what_the_manifest_says_of_requests_reaches_serve():
    """Serve's own defaults would let any number wait, and give open requests 20 s when the service ends."""
    made = deployed(max_ongoing_requests=5, max_queued_requests=7, drain_seconds=90)
    assert (made.max_ongoing_requests, made.max_queued_requests) == (5, 7)
    options = made._deployment_config
    # The replica ends its requests with words when their time is over, before Serve kills it.
    assert options.graceful_shutdown_timeout_s == 90 + KILL_SECONDS and KILL_SECONDS > 0
    assert options.backpressure_config.status_code == 503


@pytest.mark.parametrize(("replicas", "resources"), [(1, ON_HEAD), (3, None)])
def test_several_replicas_are_not_all_on_the_head(replicas: int, resources: dict[str, float] | None):
    made = deployed(replicas=replicas)
    assert made.num_replicas == replicas and made.ray_actor_options.get("resources") == resources
