"""The whole engine in one process, over in-process links: for `isotherm generate`, for tests, and for where one machine
should be fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.exchange import ExpertExchange
from isotherm.actors.attention.masks import Masks
from isotherm.actors.attention.sampling import Sampler
from isotherm.actors.attention.speculation import speculation_of
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.links.in_process import InProcessLink
from isotherm.actors.models.local_experts import LocalExperts
from isotherm.actors.models.protocol import RoutedExperts
from isotherm.actors.models.registry import load_model
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import Delta, GenerationRequest
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.cluster.placement.table import Placement, contiguous_placement
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.kernels.ops import Kernels


def local_engine(
    checkpoint: Checkpoint,
    kernels: Kernels,
    config: SchedulerConfig,
    groups: int = 1,
    placement: Placement | None = None,
    choice: WeightChoice | None = None,
    speculation: str = "off",
    tokens: int = 4,
    kv_cache_dtype: KvCacheDtype = "auto",
) -> Engine:
    """An engine over `groups` in-process expert groups (they change no token; tests use several), or with all experts
    in its own process where there is one. `choice`: in how many bits weights are kept. `speculation`: auto, mtp, ngram
    or off, with at most `tokens` drafts of a stream in one step. Raises CheckpointError where it cannot be had."""
    checkpoint, kind = checkpoint.drafting(speculation)
    c = checkpoint.config
    names = [f"expert-{i}" for i in range(groups)]
    alone = groups == 1 and placement is None
    placement = placement or contiguous_placement(c.moe_layers, c.n_routed_experts, names)
    with WeightReader(checkpoint, choice) as reader:
        model = load_model(c, kernels, reader, config.max_model_len, kv_cache_dtype=kv_cache_dtype)
        workers = {}
        for name in placement.groups():
            held = placement.held_by(name)
            workers[name] = ExpertWorker(c, kernels, slots=len(held))
            workers[name].load(reader, held)
    sampler = Sampler(kernels, Masks(lambda: Tokenizer.load(checkpoint.path).grammar_vocabulary(c.vocab_size)))
    if alone and workers:
        worker = workers[names[0]]
        experts: RoutedExperts = LocalExperts(kernels, worker.bank, worker.slot_of)
    else:
        links = {name: InProcessLink(worker.compute) for name, worker in workers.items()}
        experts = ExpertExchange(kernels, placement, links)
    engine = Engine(model, experts, config, sampler=sampler)
    engine.speculation = speculation_of(kind, tokens, engine, c.n_routed_experts, c.num_experts_per_tok)
    return engine


def run(engine: Engine, requests: Sequence[GenerationRequest]) -> Iterator[Delta]:
    """Serve requests that all arrive now, until every one is finished."""
    for request in requests:
        engine.scheduler.add(request)
    while len(engine.scheduler):
        yield from engine.step()
