"""Attention with the head sizes of published models, of one layer: the native kernels give what the reference does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_config, make_tensors, write_checkpoint
from published_families import DEEPSEEK_V32, GLM_4_7_FLASH, JOYAI_LLM_FLASH, KIMI_K2, MOONLIGHT

from isotherm.actors.local import local_engine, run
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.slow

HEADS = ("num_attention_heads", "num_key_value_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
         "v_head_dim", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "rms_norm_eps")  # fmt: skip
SMALL = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "hidden_size": 64, "moe_intermediate_size": 16,
         "q_lora_rank": 32, "max_position_embeddings": 256}  # fmt: skip


@pytest.mark.parametrize(
    "published",
    [KIMI_K2, MOONLIGHT, GLM_4_7_FLASH, JOYAI_LLM_FLASH, DEEPSEEK_V32],
    ids=["kimi_k2", "moonlight", "glm4_moe_lite", "joyai_llm_flash", "deepseek_v32"],
)
def test_native_kernels_take_published_head_sizes(published: dict[str, Any], tmp_path: Path):
    config = make_config({name: published[name] for name in HEADS if name in published} | SMALL, dtype="float32")
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, config, make_tensors(config, 3, dtype="float32")))
    rows = []
    for kernels in (ReferenceKernels(torch.float32), NativeKernels(torch.float32)):
        engine = local_engine(checkpoint, kernels, SchedulerConfig(16, 8, 20, 1, 64))
        request = GenerationRequest("r", tuple(range(9, 49)), SamplingParams(4, temperature=0.0, logprobs=300))
        deltas = list(run(engine, [request]))
        rows.append([dict(logprobs.top) for delta in deltas for logprobs in delta.logprobs])
    assert len(rows[0]) == 4
    for reference, native in zip(*rows, strict=True):
        assert native == pytest.approx(reference, abs=1e-4)
