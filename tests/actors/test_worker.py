"""A worker on a GPU: what it says where there is none, and which lanes its links get."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from native_there import require_native

from isotherm.actors import worker as worker_base
from isotherm.actors.links.registry import own_locality
from isotherm.actors.worker import WorkerBase
from isotherm.cluster.messages.membership import SupersededError
from isotherm.cluster.messages.workers import WorkerSpec
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.kernels import cpus
from isotherm.kernels.native.context import NativeContext

HOST = "127.0.0.1"
SPEC = WorkerSpec(
    id="attention-0",
    model_path=bundled_model(),
    device="cpu",
    dtype="bfloat16",
    weights=WeightChoice(),
    kernels="reference",
    threads=1,
    link_timeout=5.0,
    gather_window=1.0,
)


@pytest.fixture(autouse=True)
def environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is its process's only one, and sets its environment."""
    monkeypatch.setattr(
        os, "environ", {name: v for name, v in os.environ.items() if name not in worker_base.ENVIRONMENT}
    )


def test_a_worker_sets_what_libraries_read_unless_it_is_set(monkeypatch: pytest.MonkeyPatch):
    WorkerBase(SPEC, HOST)
    assert worker_base.ENVIRONMENT and worker_base.ENVIRONMENT.items() <= os.environ.items()
    name = next(iter(worker_base.ENVIRONMENT))
    os.environ[name] = "as the user says"
    WorkerBase(SPEC, HOST)
    assert os.environ[name] == "as the user says"


def test_a_worker_says_by_what_it_computes():
    worker = WorkerBase(SPEC, HOST)
    assert worker._common_status()["fingerprint"] is None
    found = asyncio.run(worker.fingerprint())
    assert (found.dtype, found.kept, found.device, found.kernels) == ("bfloat16", "stored", "cpu", "reference")
    assert found.weights == worker.checkpoint.digest() and f"torch {torch.__version__}" in found.instructions
    assert worker._common_status()["fingerprint"] == found.digest
    spec = replace(SPEC, dtype="float32", weights=WeightChoice(head="fp8"))
    other = asyncio.run(WorkerBase(spec, HOST).fingerprint())
    assert (other.dtype, other.kept, other.weights) == ("float32", "head fp8", found.weights)
    other = asyncio.run(WorkerBase(replace(SPEC, kv_cache_dtype="fp8"), HOST).fingerprint())
    assert other == replace(found, dtype="bfloat16 with a KV cache in fp8")


def test_without_a_gpu_a_worker_that_needs_one_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
        WorkerBase(replace(SPEC, device="cuda", kernels="auto"), HOST)


@pytest.mark.parametrize(
    ("threads", "sharers", "quota", "expected", "most"),
    [
        (None, 1, None, 12, 12),
        (None, 2, None, 6, 12),
        (None, 5, None, 2, 4),
        (None, 64, None, 1, 2),
        (3, 2, None, 3, 3),
        (None, 1, 2.5, 2, 2),
        (None, 2, 8.0, 4, 8),
        (3, 1, 2.5, 3, 3),
    ],
)
def test_threads_are_those_asked_for_or_a_share_of_the_nodes_cores(
    monkeypatch: pytest.MonkeyPatch, threads, sharers, quota, expected, most
):
    """Of a node whose control group allows less time than its cores have, that time's worth of them. Experts that are
    long to read have twice the share."""
    spread: list[int] = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    monkeypatch.setattr(NativeContext, "spread", lambda context, threads: spread.append(threads))
    require_native()
    worker = WorkerBase(replace(SPEC, kernels="native", threads=threads, sharers=sharers), HOST)
    assert worker.threads == worker._common_status()["threads"] == expected
    assert spread == ([most] if most > expected else [])


def test_a_worker_says_where_its_rows_are(monkeypatch: pytest.MonkeyPatch):
    worker = WorkerBase(SPEC, HOST)
    assert asyncio.run(worker.locality()) == own_locality() and own_locality().device == "cpu"
    worker.spec = replace(SPEC, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a-b-c"))
    assert asyncio.run(worker.locality()) == replace(own_locality(), device="cuda", gpu="a-b-c")


def test_a_worker_says_of_itself_what_its_links_need():
    end = WorkerBase(SPEC, HOST).link_end()
    assert (end.host, end.device, end.dtype, end.timeout) == (HOST, torch.device("cpu"), torch.bfloat16, 5.0)
    config = WorkerBase(SPEC, HOST).checkpoint.config
    assert (end.width, end.top_k) == (config.hidden_size, config.num_experts_per_tok)


def test_a_load_that_fails_is_not_under_way_any_longer():
    """It was said to go on for ever, and to read ever more slowly."""
    worker = WorkerBase(SPEC, HOST)
    with pytest.raises(OSError, match="the disk is gone"), worker._reading() as reader:
        reader.bytes_read = 1000
        raise OSError("the disk is gone")
    read = worker._read_so_far()
    assert read[0] == 1000 and worker._read_so_far() == read


def test_orders_of_a_controller_that_has_been_superseded_are_refused():
    async def orders() -> None:
        worker = WorkerBase(SPEC, HOST)
        assert await worker.order(1, "pid") == os.getpid()
        assert await worker.order(1, "pid") == await worker.order(2, "pid") == os.getpid()
        with pytest.raises(SupersededError, match="attention-0 obeys controller 2, not 1: locality is refused"):
            await worker.order(1, "locality")
        assert await worker.order(2, "locality") == await worker.locality()

    asyncio.run(orders())
