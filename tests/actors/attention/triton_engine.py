"""The engine on Triton kernels: interpreted, run by test_triton_engine.py in a process with TRITON_INTERPRET=1, or on a
GPU, run by `make test-gpu`.

Interpreted, everything is as between two GPUs, but that tensors are on the CPU: the shard's and the group's kernels,
weights, caches and batches, and a link whose rows go over a process group of their own.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from triton_cases import DEVICE

from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.exchange import ExpertExchange
from isotherm.actors.experts.python_loop import PythonLoop
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.links.device_lane import DataLane
from isotherm.actors.links.process_group import CPU, ProcessGroupLink, ProcessGroupServerLink, open_process_group
from isotherm.actors.links.rendezvous import Rendezvous
from isotherm.actors.local import local_engine, run
from isotherm.actors.models.deepseek_v3 import DeepseekV3Model
from isotherm.actors.models.local_experts import LocalExperts
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.cluster.placement.table import contiguous_placement
from isotherm.kernels.ops import Kernels
from isotherm.kernels.reference import ReferenceKernels
from isotherm.kernels.select import select_kernels
from isotherm.kernels.triton.backend import TritonKernels
from isotherm.kernels.triton.launch import launch
from isotherm.kernels.triton.weights import TritonExpertBank

HOST = "127.0.0.1"
CONFIG = SchedulerConfig(block_size=16, blocks=16, max_batch_tokens=48, max_sequences=4, max_model_len=64)
# Greedy, sampled, and a prompt that is cut into chunks beside the others.
REQUESTS = [
    GenerationRequest(
        f"request-{i}",
        tuple(range(3 + i, 3 + i + length)),
        SamplingParams(5, temperature, top_p=0.9, seed=i, logprobs=3),
    )
    for i, (length, temperature) in enumerate([(20, 0.0), (5, 1.0), (33, 0.7)])
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), {"num_hidden_layers": 2}, 3, fp8=True)
    return Checkpoint.open(path)


_one_at_a_time = threading.Lock()


def take_turns(*arguments: Any) -> None:
    """The interpreter knows one program at a time; a shard and a group have threads of their own."""
    with _one_at_a_time:
        launch(*arguments)


def generated(
    engine: Engine, requests: list[GenerationRequest] = REQUESTS
) -> tuple[dict[str, list[int]], torch.Tensor]:
    """Tokens by request, and the log-probabilities of all, in order."""
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}
    for delta in run(engine, requests):
        tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        logprobs.setdefault(delta.request_id, []).extend(p.chosen for p in delta.logprobs)
    return tokens, torch.tensor([p for name in sorted(logprobs) for p in logprobs[name]])


@contextmanager
def linked_engine(checkpoint: Checkpoint, kernels: Kernels) -> Iterator[Engine]:
    """A shard and a group of threads of this process."""
    config, prefix, rendezvous = checkpoint.config, uuid.uuid4().hex, Rendezvous(HOST)
    placement = contiguous_placement(config.moe_layers, config.n_routed_experts, ["group"])

    def lanes(rank: int):
        """On one GPU there is no second lane: rows pass through pinned memory."""
        group = open_process_group(HOST, rendezvous.port, f"{prefix}/host", rank, HOST, 20.0)
        if kernels.device.type == "cuda":
            return group, None
        rows = open_process_group(HOST, rendezvous.port, f"{prefix}/rows", rank, HOST, 20.0)
        lane = DataLane(rows, 1 - rank, CPU, 60.0)
        lane.greet(first=rank == 0)
        return group, lane

    with WeightReader(checkpoint) as reader:
        worker = ExpertWorker(config, kernels, len(placement.held_by("group")))
        worker.load(reader, placement.held_by("group"))
        model = DeepseekV3Model(config, kernels, reader, CONFIG.max_model_len)

    def serve() -> None:
        group, lane = lanes(1)
        PythonLoop(worker).attach(
            "shard", ProcessGroupServerLink(group, config.hidden_size, device=kernels.device, lane=lane)
        )

    thread = threading.Thread(target=serve)
    thread.start()
    group, lane = lanes(0)
    thread.join()
    link = ProcessGroupLink(group, 60.0, device=kernels.device, lane=lane)
    yield Engine(model, ExpertExchange(kernels, placement, {"group": link}, patience=1.0), CONFIG)
    link.close()


def test_the_engine_says_what_it_says_on_the_reference(checkpoint: Checkpoint):
    assert isinstance(select_kernels("triton", torch.float32, device=DEVICE).kernels, TritonKernels)
    expected_tokens, expected = generated(local_engine(checkpoint, ReferenceKernels(torch.float32), CONFIG))
    assert {len(tokens) for tokens in expected_tokens.values()} == {5}
    with linked_engine(checkpoint, TritonKernels(torch.float32, DEVICE, take_turns)) as engine:
        tokens, logprobs = generated(engine)
    assert tokens == expected_tokens
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)


def test_the_manifests_weights_and_kv_cache_dtype_say_what_they_say_on_the_reference(checkpoint: Checkpoint):
    """Integers and rows in FP8, kept as they are stored."""
    choice = WeightChoice(experts="int4", dense="int4", head="int8")
    expected, engine = (
        local_engine(checkpoint, kernels, CONFIG, choice=choice, kv_cache_dtype="fp8")
        for kernels in (ReferenceKernels(torch.float32), TritonKernels(torch.float32, DEVICE))
    )
    assert isinstance(engine.model, DeepseekV3Model) and isinstance(engine.experts, LocalExperts)
    bank, _ = engine.experts.bank_of(1)
    assert isinstance(bank, TritonExpertBank)
    kept = engine.model.layers[0].attention.o.data, engine.model.head.data, bank.variants[0].example[0]
    assert [weight.form.data for weight in kept] == [torch.uint8, torch.int8, torch.uint8]
    assert {cache.dtype for cache in engine.cache} == {torch.uint8}
    (tokens, logprobs), (expected_tokens, expected_logprobs) = (generated(e, REQUESTS[1:2]) for e in (engine, expected))
    assert tokens == expected_tokens
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=1e-4)
