"""The Ray Serve deployment in front: builds the HTTP application in each replica, over the shards that the controller
names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from starlette.applications import Starlette

from isotherm.cluster.api.access.key_store import KeySource, KeyStore
from isotherm.cluster.api.batches.service import BatchService
from isotherm.cluster.api.draining import EndableEngine, end_when_stopping
from isotherm.cluster.api.line.replica_end import ReplicaLineMiddleware
from isotherm.cluster.api.onward import Onward, OnwardMiddleware
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.background import Background
from isotherm.cluster.control.liveness import watch_controller
from isotherm.cluster.deploy.batches import batch_service, batches_refused
from isotherm.cluster.deploy.kept_responses import SharedResponseStore
from isotherm.cluster.front_door import front_door
from isotherm.cluster.logs import set_up_logs
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.messages.membership import ShardLimits
from isotherm.cluster.model.registry import load_config
from isotherm.cluster.observe import standstill
from isotherm.cluster.observe.ingress import IngressObserver
from isotherm.cluster.on_ray.controller_client import ControllerClient
from isotherm.cluster.on_ray.controller_process import ON_HEAD, ControllerProcess, find_controller
from isotherm.cluster.on_ray.replica_port import listen_at_node_address_alone
from isotherm.cluster.routing.shard_client import ShardClient

NAME = "ingress"  # of the deployment
CONTROLLER_SECONDS = 60.0  # in which the controller must say what is served; Serve starts the replica again then
KILL_SECONDS = 5.0  # after which a replica that has ended its requests is killed


def ingress_application(manifest: Manifest, keys: KeySource | None) -> Application:
    """The Serve application; the model that the controller serves, and the file of keys, must be readable where
    replicas run. Without `keys` nobody is asked for one."""

    def build() -> Starlette:  # runs in each replica, on the event loop that will serve its requests
        listen_at_node_address_alone()
        model_path, limits = _what_serves()
        controller = ControllerClient()
        engine = ShardClient(controller, load_config(model_path).vocab_size, limits)
        engine.start()
        if limit := manifest.liveness.timeout:
            engine.background.keep(
                "the watch over the controller", lambda: watch_controller(ControllerProcess(), limit)
            )
        endable = EndableEngine(engine)
        stops, seconds = _replica_stops(), manifest.http.drain_seconds
        engine.background.keep("the drain", lambda: end_when_stopping(endable, stops, seconds))
        store = SharedResponseStore(manifest.http.kept_responses) if manifest.http.replicas > 1 else None
        refused = batches_refused(manifest.http)
        batches = None if refused else batch_service(manifest.http, AppSettings.max_body_bytes)
        observer = _observer(manifest, controller, batches)
        _keep_observing(engine.background, observer)
        app = front_door(
            manifest,
            model_path,
            endable,
            controller,
            store,
            batches,
            refused,
            observer=observer,
            keys=None if keys is None else KeyStore(keys, manifest.http.replicas),
            ends=stops,
        )
        onward = Onward(observer.name, endable)
        engine.background.keep("the look whether requests get on", onward.keep_looking)
        app.add_middleware(OnwardMiddleware, onward=onward)
        app.add_middleware(ReplicaLineMiddleware)  # outermost: it takes on what all others have made
        if batches is not None:
            batches.begin()  # with what a replica before this one has left
        return app

    deployment: Any = serve.deployment(
        serve.ingress(build)(),
        name=NAME,
        num_replicas=manifest.http.replicas,
        max_ongoing_requests=manifest.http.max_ongoing_requests,
        max_queued_requests=manifest.http.max_queued_requests,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        # Several replicas are spread, so that the loss of a node is not the loss of all.
        ray_actor_options={"num_cpus": 0} | ({"resources": ON_HEAD} if manifest.http.replicas == 1 else {}),
        # What Serve does to a replica that is updated or deleted; the replica itself ends its requests a little
        # earlier, with words.
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=manifest.http.drain_seconds + KILL_SECONDS,
        max_surge_percent=100,  # an update begins with the new replicas: there is always one that takes requests
        health_check_period_s=1,  # a replica that has died is missed that soon; one that is silent has Serve's 30 s
    )
    application: Application = deployment.bind()
    return application


def _what_serves() -> tuple[Path, ShardLimits]:
    """The model that serves now, and what its shards take: other weights, or other values, may have been rolled out
    since the cluster was started. Waits for a controller that is on its way."""
    path, limits = ray.get(find_controller().what_serves.remote(), timeout=CONTROLLER_SECONDS)
    return Path(path), limits


def _observer(manifest: Manifest, controller: ControllerClient, batches: BatchService | None) -> IngressObserver:
    """Named as Serve names this replica, as far as it takes to tell it from others."""
    name = f"ingress-{serve.get_replica_context().replica_id.unique_id}"
    set_up_logs(name, manifest.logging.format, manifest.logging.level, logger="isotherm")
    observer = IngressObserver.of(manifest, name, controller)
    if batches is not None:
        observer.waiting_batches = batches.waiting
    return observer


def _keep_observing(background: Background, observer: IngressObserver) -> None:
    background.keep("the reports of what is observed", observer.keep_reporting)
    background.keep("the look whether the event loop stands still", standstill.keep_watch)


def _replica_stops() -> Callable[[], bool]:
    """Whether Serve has told this process's replica to stop. Serve has no hook for that moment: it calls the
    application only when all requests have ended (ray/serve/_private/replica.py, `_perform_graceful_shutdown`)."""
    worker = ray._private.worker.global_worker
    replica = worker.actors[worker.actor_id]._replica_impl
    return lambda: replica._shutting_down
