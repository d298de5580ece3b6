"""The host side of the CUDA path, without a GPU: the engine end to end on interpreted Triton kernels, in a process of
its own (Triton reads TRITON_INTERPRET when it is imported), and the model on meta tensors, where any tensor that stayed
on the CPU shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from torch import Tensor

from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.models.deepseek_v3 import DeepseekV3Model
from isotherm.actors.models.step_batch import build_batch
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.engine.sequence import Chunk, Form, ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.kernels.ops import LinearWeight, Router
from isotherm.kernels.triton.backend import TritonKernels

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent


def test_the_engine_on_interpreted_kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / "triton_engine.py")]
    done = subprocess.run(command, cwd=FOLDER.parents[2], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


class Recorder:
    """A launcher that starts nothing, and insists that every tensor is on the device."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int, stages: int) -> None:
        elsewhere = {
            name: t.device.type for name, t in arguments.items() if isinstance(t, Tensor) and t.device.type != "meta"
        }
        assert not elsewhere, f"{kernel.fn.__name__} was given tensors that are not on the device: {elsewhere}"
        self.launched.append(kernel.fn.__name__)


class NoExperts:
    """Routed experts that answer with zeros."""

    def __init__(self, kernels: TritonKernels) -> None:
        self.kernels = kernels
        self.layers: list[int] = []

    def begin_step(self) -> None: ...

    def end_step(self) -> None: ...

    def bank_of(self, layer: int) -> None: ...

    def advance(self, *_: object) -> None: ...

    def moe(
        self, layer: int, x_TD: Tensor, router: Router, gate_up: LinearWeight, down: LinearWeight, residual_TD: Tensor
    ) -> Tensor:
        assert {t.device.type for t in (x_TD, residual_TD, *self.kernels.route(x_TD, router))} == {"meta"}
        self.layers.append(layer)
        return residual_TD + self.kernels.mlp(x_TD, gate_up, down)


@pytest.mark.parametrize("options", [{"fp8": True}, {"dtype": "bfloat16"}], ids=["fp8", "bf16"])
def test_everything_is_on_the_device(tmp_path: Path, options: dict[str, Any]):
    config = Checkpoint.open(make_checkpoint(tmp_path, {"attention_bias": True}, **options)).config
    recorder = Recorder()
    kernels = TritonKernels(torch.bfloat16, "meta", recorder)
    with WeightReader(Checkpoint.open(tmp_path)) as reader:
        model = DeepseekV3Model(config, kernels, reader, 128)
    cache, experts = model.new_cache(16, 16), NoExperts(kernels)
    request = GenerationRequest("r", tuple(range(40)), SamplingParams(8))
    chunks = [
        Chunk(ScheduledSequence(request, 0, [*range(41)], blocks=[0, 1, 2]), 40, 1, Form.DECODE, sample=True),
        Chunk(ScheduledSequence(request, 1, [*range(40)], blocks=[3, 4, 5]), 16, 24, Form.PREFILL, sample=True),
    ]
    batch = build_batch(chunks, 16, model.cos, model.sin)
    logits = model.logits(model.forward(batch, cache, experts)[batch.sample_rows])
    assert logits.shape == (2, config.vocab_size) and logits.device.type == "meta"
    assert experts.layers == list(config.moe_layers)
    assert {"mla_decode_kernel", "mla_prefill_kernel", "route_select_kernel", "write_cache_kernel"} <= set(
        recorder.launched
    )


def test_a_groups_experts_are_on_the_device(tmp_path: Path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, fp8=True))
    recorder = Recorder()
    kernels = TritonKernels(torch.bfloat16, "meta", recorder)
    worker = ExpertWorker(checkpoint.config, kernels, 4)
    with WeightReader(checkpoint) as reader:
        worker.load(reader, [(1, e) for e in range(3)])
    # As they come: on the host
    rows, slots, offsets = (torch.tensor(values, dtype=torch.int32) for values in ([0, 1, 0], [0, 2], [0, 2, 3]))
    x = torch.zeros(2, checkpoint.config.hidden_size, dtype=torch.bfloat16, device="meta")
    assert kernels.experts(x, worker.bank, rows, slots, offsets).device.type == "meta"
    combined = kernels.combine(
        torch.zeros(3, 8, dtype=torch.bfloat16, device="meta"), torch.tensor([[0, 2]]), torch.ones(1, 2)
    )
    assert combined.device.type == "meta" and recorder.launched == [
        "expert_gate_up_kernel",
        "expert_down_kernel",
        "combine_kernel",
    ]
