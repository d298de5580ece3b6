"""The whole engine in one process, over in-process links: for `isotherm generate`, for tests, and for where one machine should be fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from isotherm.actors.engine import Engine
from isotherm.actors.exchange import ExpertExchange, InProcessLink
from isotherm.actors.expert_worker import ExpertWorker
from isotherm.actors.model import AttentionModel
from isotherm.actors.weights import WeightReader
from isotherm.cluster.checkpoint import Checkpoint
from isotherm.cluster.placement import Placement, contiguous_placement
from isotherm.cluster.requests import Delta, GenerationRequest
from isotherm.cluster.scheduler import SchedulerConfig
from isotherm.kernels.ops import Kernels


def local_engine(checkpoint: Checkpoint, kernels: Kernels, config: SchedulerConfig, groups: int = 1, placement: Placement | None = None,
                 head: str = "stored") -> Engine:
    """An engine over `groups` in-process expert groups (they change no token; tests use several). `head`: as in AttentionModel."""
    c = checkpoint.config
    names = [f"expert-{i}" for i in range(groups)]
    placement = placement or contiguous_placement(c.moe_layers, c.n_routed_experts, names)
    with WeightReader(checkpoint) as reader:
        model = AttentionModel(c, kernels, reader, config.max_model_len, head=head)
        links = {}
        for name in placement.groups():
            held = placement.held_by(name)
            worker = ExpertWorker(c, kernels, slots=len(held))
            worker.load(reader, held)
            links[name] = InProcessLink(worker.compute)
    return Engine(model, ExpertExchange(kernels, placement, links), config)


def run(engine: Engine, requests: Sequence[GenerationRequest]) -> Iterator[Delta]:
    """Serve requests that all arrive now, until every one is finished."""
    for request in requests:
        engine.scheduler.add(request)
    while len(engine.scheduler):
        yield from engine.step()
