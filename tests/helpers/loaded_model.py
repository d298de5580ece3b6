"""What the bundled model gives a request that has an engine of its own."""

from __future__ import annotations

from functools import cache

from isotherm.actors.local import local_engine, run
from isotherm.actors.models.weights import parse_dtype
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import GenerationRequest
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.kernels.select import select_kernels


@cache
def alone(request: GenerationRequest) -> list[int]:
    kernels = select_kernels("auto", parse_dtype("bfloat16")).kernels
    engine = local_engine(
        Checkpoint.open(bundled_model()), kernels, SchedulerConfig(16, 256, 512, 1, 4096, prefix_cache=False)
    )
    return [token for delta in run(engine, [request]) for token in delta.token_ids]
