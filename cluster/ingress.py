"""The Ray Serve deployment in front: builds the HTTP application in each replica, over the shards that the controller names. Stateless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from isotherm.cluster.controller_client import ControllerClient
from isotherm.cluster.http_access import Access
from isotherm.cluster.http_app import AppSettings, build_app
from isotherm.cluster.liveness import watch_controller
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.model_config import ModelConfig
from isotherm.cluster.ray_workers import ON_HEAD, ControllerProcess
from isotherm.cluster.shard_client import ShardClient
from isotherm.cluster.text import Tokenizer


def ingress_application(manifest: Manifest, model_path: Path) -> Application:
    """The Serve application; the model's path must be readable where replicas run."""

    def build():  # runs in each replica, on the event loop that will serve its requests
        config = ModelConfig.load(model_path)
        controller = ControllerClient()
        shard_capacity = manifest.engine.max_sequences + manifest.engine.max_waiting
        max_model_len = manifest.scheduler_config(config).max_model_len
        engine = ShardClient(controller, config.vocab_size, max_model_len, shard_capacity)
        engine.start()
        if limit := manifest.liveness.timeout:
            engine.background.keep("the watch over the controller", lambda: watch_controller(ControllerProcess(), limit))
        settings = AppSettings(access=Access(manifest.http.admin, manifest.http.metrics))
        return build_app(engine, Tokenizer.load(model_path), manifest.model_id, settings=settings, admin=controller)

    deployment: Any = serve.deployment(
        serve.ingress(build)(),
        name="ingress",
        num_replicas=manifest.http.replicas,
        max_ongoing_requests=manifest.http.max_ongoing_requests,
        max_queued_requests=manifest.http.max_queued_requests,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        # Several replicas are spread, so that the loss of a node is not the loss of all.
        ray_actor_options={"num_cpus": 0} | ({"resources": ON_HEAD} if manifest.http.replicas == 1 else {}),
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,
    )
    return deployment.bind()
