"""What the bundled model gives a request that has an engine of its own."""

from __future__ import annotations

from functools import cache

from isotherm.actors.local import local_engine, run
from isotherm.actors.weights import parse_dtype
from isotherm.cluster.checkpoint import Checkpoint
from isotherm.cluster.model_path import bundled_model
from isotherm.cluster.requests import GenerationRequest
from isotherm.cluster.scheduler import SchedulerConfig
from isotherm.kernels.select import select_kernels


@cache
def alone(request: GenerationRequest) -> list[int]:
    kernels = select_kernels("auto", parse_dtype("bfloat16")).kernels
    engine = local_engine(Checkpoint.open(bundled_model()), kernels, SchedulerConfig(16, 256, 512, 1, 4096, prefix_cache=False))
    return [token for delta in run(engine, [request]) for token in delta.token_ids]
