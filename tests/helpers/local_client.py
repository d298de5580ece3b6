"""The bundled model behind the HTTP application, in this process and without Ray: for tests of what replies say of real
tokens."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch

from isotherm.actors.attention.engine import Engine
from isotherm.actors.local import local_engine
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import Delta, GenerationRequest
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.kernels.select import select_kernels

TINY = Path(__file__).resolve().parents[2] / "manifests" / "tiny"


class LocalClient:
    """An EngineClient whose readers take the engine's steps themselves, in turn. `rows` counts those that were
    computed. `speculation`: what guesses tokens, as many as there can be in every step."""

    system_fingerprint = "isotherm-local"

    def __init__(self, path: Path = TINY, speculation: str = "off", **config: Any) -> None:
        checkpoint = Checkpoint.open(path)
        asked = {"block_size": 16, "blocks": 512, "max_batch_tokens": 512, "max_sequences": 64, "max_model_len": 512}
        scheduler = SchedulerConfig(**{**asked, **config})
        kernels = select_kernels("auto", torch.bfloat16).kernels
        self.engine: Engine = local_engine(checkpoint, kernels, scheduler, speculation=speculation)
        if self.engine.speculation is not None:
            self.engine.speculation.lengths = None
        self.vocab_size, self.max_model_len = checkpoint.config.vocab_size, scheduler.max_model_len
        self.rows = 0
        self._deltas: dict[str, deque[Delta]] = {}
        forward = self.engine.model.forward

        def counted(batch: Any, *rest: Any) -> torch.Tensor:
            self.rows += len(batch.token_ids)
            return forward(batch, *rest)

        self.engine.model.forward = counted  # type: ignore[method-assign]

    def not_ready(self) -> str | None:
        return None

    async def held_up(self) -> str | None:
        return None

    def capacity(self) -> int:
        return 256

    def token_capacity(self) -> int:
        return self.engine.scheduler.config.room.tokens

    async def status(self) -> dict[str, Any]:
        return {}

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        mine = self._deltas[request.id] = deque()
        self.engine.scheduler.add(request)
        try:
            while True:
                await asyncio.sleep(0)
                if not mine:
                    for delta in self.engine.step():
                        self._deltas[delta.request_id].append(delta)
                while mine:
                    yield (delta := mine.popleft())
                    if delta.finish_reason is not None:
                        return
        finally:
            self.engine.scheduler.abort(request.id)
            del self._deltas[request.id]
