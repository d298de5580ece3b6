"""The routes that tell about the server: models, health, readiness, status, version."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from datetime import datetime, timezone

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from isotherm.cluster.api.access.caller import caller_of
from isotherm.cluster.api.access.limits import allowed_models
from isotherm.cluster.api.engine_client import EngineClient
from isotherm.cluster.api.prepare import OPENAI_DEFAULTS, check_model
from isotherm.cluster.api.replies import json_response
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.jsontypes import JSON


class About:
    """What the server says of itself. `models`: the served model's names, its own first."""

    def __init__(self, engine: EngineClient, models: Sequence[str], settings: AppSettings) -> None:
        self._engine = engine
        self._models = tuple(models)
        self._settings = settings
        self._created = int(time.time())
        self._version = importlib.metadata.version("isotherm")

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/status", self.status),
            Route("/version", self.version),
        ]

    async def models(self, request: Request) -> Response:
        models = allowed_models(caller_of(request), self._models)
        ends = {"has_more": False, "first_id": models[0], "last_id": models[-1]}  # as Anthropic has it
        return json_response({"object": "list", "data": [self._model(name) for name in models], **ends})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        check_model(name, allowed_models(caller_of(request), self._models))
        return json_response(self._model(name))

    async def health(self, request: Request) -> Response:
        return json_response({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        reason = self._engine.not_ready() or await self._engine.held_up()
        if reason is None:
            return json_response({"status": "ready"})
        # Whoever asks needs no key, so where there are keys he does not learn what is the matter with the cluster.
        said = {"status": "not ready"} | ({"reason": reason} if self._settings.keys is None else {})
        return json_response(said, 503, self._settings.retry_after)

    async def status(self, request: Request) -> Response:
        return json_response(await self._engine.status())

    async def version(self, request: Request) -> Response:
        return json_response({"version": self._version})

    def _model(self, name: str) -> JSON:
        """In OpenAI's words and in Anthropic's."""
        created_at = datetime.fromtimestamp(self._created, timezone.utc).isoformat().replace("+00:00", "Z")
        return {
            "id": name,
            "object": "model",
            "type": "model",
            "display_name": name,
            "lifecycle": "active",
            "created": self._created,
            "created_at": created_at,
            "owned_by": "isotherm",
            "root": self._models[0],
            "max_model_len": self._engine.max_model_len,
            "vocab_size": self._engine.vocab_size,
            "default_sampling": {**OPENAI_DEFAULTS, **self._settings.defaults},
        }
