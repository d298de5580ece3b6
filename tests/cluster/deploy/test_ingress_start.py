"""What becomes of the ingress's start, and of its update, when a replica is lost before all have started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentStatusInfo
from ray.serve._private.common import DeploymentStatusInternalTrigger as Happens
from ray.serve.schema import DeploymentStatus

from isotherm.cluster.deploy import ingress_start
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.supervise.supervisor import ServeError

LOST = "A replica's health check failed. This deployment will be UNHEALTHY until the replica recovers."


class Serve:
    """Serve's account of a deployment, which changes at each look, by Serve's own transitions; `run` raises as Serve's
    does when it comes upon a failure."""

    def __init__(self, *happens: Happens) -> None:
        self._happens = list(happens)
        self._status = DeploymentStatusInfo("ingress", DeploymentStatus.UPDATING, "CONFIG_UPDATE_STARTED")
        self.waited_for_proxies = 0

    def _next(self) -> None:
        if self._happens:
            self._status = self._status.handle_transition(self._happens.pop(0), LOST)

    def run(self, *_: object, **__: object) -> None:
        while self._status.status is DeploymentStatus.UPDATING:
            self._next()
        if self._status.status is DeploymentStatus.DEPLOY_FAILED:
            raise RuntimeError(f"Deploying application isotherm failed: {self._status.message}")

    def status(self) -> SimpleNamespace:
        shown = self._status
        self._next()
        return SimpleNamespace(applications={"isotherm": SimpleNamespace(deployments={ingress_start.NAME: shown})})

    def wait_for_proxies_serving(self) -> None:
        self.waited_for_proxies += 1


@pytest.fixture
def started(monkeypatch):
    def start(*happens: Happens) -> Serve:
        serve = Serve(*happens)
        monkeypatch.setattr(ingress_start, "serve", serve)
        monkeypatch.setattr(ingress_start, "_get_global_client", lambda: serve)
        monkeypatch.setattr(ingress_start, "_LOOK_SECONDS", 0.001)
        ingress_start.run_ingress(parse_manifest({"model": "tiny"}), None)
        return serve

    return start


@pytest.mark.parametrize("losses", [1, 3])
def test_a_replica_that_is_lost_while_others_start_is_replaced(started, losses: int):
    serve = started(*[Happens.HEALTH_CHECK_FAILED] * losses, Happens.HEALTHY)
    assert serve.waited_for_proxies == 1


def test_replicas_that_cannot_start_are_an_error_at_once(started, monkeypatch):
    monkeypatch.setattr(ingress_start.time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(ServeError, match="A replica's health check failed"):
        started(Happens.REPLICA_STARTUP_FAILED)


def test_a_replica_whose_replacements_cannot_start_is_an_error(started):
    with pytest.raises(ServeError, match="A replica's health check failed"):
        started(Happens.HEALTH_CHECK_FAILED, Happens.HEALTH_CHECK_FAILED, Happens.REPLICA_STARTUP_FAILED)


def test_replicas_that_are_lost_again_and_again_are_an_error_in_the_end(started, monkeypatch):
    monkeypatch.setattr(ingress_start, "LOST_SECONDS", 0.05)
    with pytest.raises(ServeError, match="A replica's health check failed"):
        started(Happens.HEALTH_CHECK_FAILED)


def test_undisturbed_serve_has_waited_for_its_proxies_itself(started):
    assert started(Happens.HEALTHY).waited_for_proxies == 0


@pytest.mark.parametrize("error", [RuntimeError, RayError])
def test_a_port_that_something_else_has_is_named(monkeypatch, error: type[Exception]):
    """On a Ray that was there before; on one of its own `isotherm serve` holds the port."""

    def refuse(**_: object) -> None:
        raise error("Failed to bind to address '127.0.0.1:8765'.")

    monkeypatch.setattr(ingress_start.serve, "start", refuse)
    with pytest.raises(ServeError, match=r"cannot listen on 127\.0\.0\.1:8765, where something else does.*--port"):
        ingress_start.start_ingress(parse_manifest({"http": {"port": 8765}}), None)


def test_another_error_of_serves_stays_what_it_is(monkeypatch):
    def refuse(**_: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(ingress_start.serve, "start", refuse)
    with pytest.raises(RuntimeError, match="no such thing"):
        ingress_start.start_ingress(parse_manifest({}), None)
