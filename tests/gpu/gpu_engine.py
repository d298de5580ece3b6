"""The engine on a GPU: the bundled model's tokens, alone and in company, and rows over NCCL. `make test-gpu` runs this.

NCCL allows no two ranks on one GPU. Ends that give themselves host names of their own are taken for two machines, and
rows go through NCCL's sockets."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid

import pytest
import torch
from weight_cases import randn

from isotherm.actors.links.device_lane import open_data_lane
from isotherm.actors.links.protocol import LinkError
from isotherm.actors.links.rendezvous import Rendezvous
from isotherm.actors.local import local_engine, run
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.kernels.reference import ReferenceKernels
from isotherm.kernels.triton.backend import TritonKernels

CHOICES = {
    "stored": WeightChoice(),
    "fp8": WeightChoice(dense="fp8", head="fp8"),
    "int4": WeightChoice(experts="int4", dense="int4", head="int8"),
}
TOKENS = 40


def requests() -> list[GenerationRequest]:
    draw = torch.Generator().manual_seed(1)
    return [
        GenerationRequest(
            f"request-{i}",
            tuple(torch.randint(10, 500, (length,), generator=draw).tolist()),
            SamplingParams(TOKENS, temperature, top_p=0.9 if i % 3 else 1.0, seed=i),
        )
        for i, (length, temperature) in enumerate((3 + 11 * i, [0.0, 1.0, 0.7][i % 3]) for i in range(16))
    ]


def generated(engine, some: list[GenerationRequest]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for delta in run(engine, some):
        tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    return tokens


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("choice", CHOICES)
def test_streams_alone_are_as_together(choice: str, cache) -> None:
    checkpoint = Checkpoint.open(bundled_model())
    kernels = TritonKernels(torch.bfloat16, "cuda")
    config = SchedulerConfig(16, 400, 96, 16, 512)
    engine = local_engine(checkpoint, kernels, config, choice=CHOICES[choice], kv_cache_dtype=cache)
    together = generated(engine, requests())
    assert {len(tokens) for tokens in together.values()} == {TOKENS}
    for request in requests():
        assert generated(engine, [request]) == {request.id: together[request.id]}
    groups = local_engine(checkpoint, kernels, config, groups=3, choice=CHOICES[choice], kv_cache_dtype=cache)
    assert generated(groups, requests()) == together
    for kind in ("mtp", "ngram"):
        drafting = local_engine(
            checkpoint, kernels, config, choice=CHOICES[choice], speculation=kind, kv_cache_dtype=cache
        )
        assert generated(drafting, requests()) == together, kind


def test_float32_says_what_the_reference_says() -> None:
    checkpoint = Checkpoint.open(bundled_model())
    config = SchedulerConfig(16, 400, 96, 16, 512)
    ours, theirs = (
        generated(local_engine(checkpoint, k, config), requests())
        for k in (TritonKernels(torch.float32, "cuda"), ReferenceKernels(torch.float32))
    )
    assert ours == theirs


def lane_end(port: int, prefix: str, rank: int):
    return open_data_lane("127.0.0.1", port, prefix, rank, device=torch.device("cuda:0"), meeting=60.0, timeout=10.0)


def answer(port: int, prefix: str) -> None:
    """The other end: gives back what comes, doubled."""
    lane = lane_end(port, prefix, 1)
    for rows in (1, 7, 300, 0, 64):
        lane.send(lane.receive(rows, 7168, torch.bfloat16) * 2)
    lane.receive(1, 1, torch.float32)
    os._exit(0)


def test_rows_go_over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_HOSTID", "first")
    rendezvous, prefix = Rendezvous("127.0.0.1"), uuid.uuid4().hex
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; import gpu_engine; gpu_engine.answer({rendezvous.port}, {prefix!r})"
    )
    peer = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "NCCL_HOSTID": "second"})
    try:
        lane = lane_end(rendezvous.port, prefix, 0)
        for rows in (1, 7, 300, 0, 64):
            x = randn(rows, 7168, seed=rows, dtype=torch.bfloat16).cuda()
            lane.send(x * 1)
            assert torch.equal(lane.receive(rows, 7168, torch.bfloat16), x * 2)
        lane.send(torch.zeros(1, 1, device="cuda"))
        assert peer.wait(30) == 0
        lane.close()
    finally:
        peer.kill()


def test_a_lane_whose_peer_died_is_lost_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_HOSTID", "first")
    rendezvous, prefix = Rendezvous("127.0.0.1"), uuid.uuid4().hex
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; import gpu_engine, time; "
        f"lane = gpu_engine.lane_end({rendezvous.port}, {prefix!r}, 1); time.sleep(600)"
    )
    peer = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "NCCL_HOSTID": "second"})
    try:
        lane = lane_end(rendezvous.port, prefix, 0)
        lane._timeout = 2.0
        peer.kill()
        peer.wait()
        begin = time.monotonic()
        with pytest.raises(LinkError):
            lane.receive(5, 64, torch.bfloat16)
        assert time.monotonic() - begin < 15
        torch.cuda.synchronize()  # the device is free again
        assert torch.ones(3, device="cuda").sum().item() == 3
    finally:
        peer.kill()
