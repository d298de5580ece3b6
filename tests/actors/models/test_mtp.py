"""The multi-token-prediction layer beside a statement of it in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from stated_mtp import Stated, loaded
from torch import Tensor

from isotherm.actors.models.step_batch import Span, attention_rows
from isotherm.cluster.engine.sequence import Form
from isotherm.cluster.model.checkpoint import Checkpoint, CheckpointError

TOKENS = 23
BLOCKS = [3, 0, 5, 1, 4, 2]  # of four tokens


def own_copies(tensors: dict[str, Tensor]) -> None:
    """Embedding and head of the layer's own, unlike the main model's."""
    for name in [name for name in tensors if name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))]:
        if name.startswith("model.layers."):
            tensors[name] = tensors[name].flip(0).contiguous()


def no_copies(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))]:
        if name.startswith("model.layers."):
            del tensors[name]


FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "glm4_moe_lite": {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, "rms_norm_eps": 1e-5},
    "joyai_llm_flash": {"n_group": 1, "topk_group": 1, "rope_theta": 3.2e7},
}


@pytest.mark.parametrize("change", [lambda _: None, own_copies, no_copies], ids=["copies", "own", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_logits_are_those_of_the_statement(tmp_path: Path, family: str, change):
    """Also applied to its own output, in both forms of attention."""
    config = {"model_type": family, "vocab_size": 200, **FAMILIES[family]}
    make_checkpoint(tmp_path, config, dtype="float32", mtp=True, change=change)
    (model, experts), stated = loaded(tmp_path), Stated(tmp_path)
    assert stated.config.model_type == family
    rng = torch.Generator().manual_seed(5)
    tokens = torch.randint(200, (TOKENS,), generator=rng)
    output = torch.randn(TOKENS, stated.config.hidden_size, generator=rng)  # of the main model's last layer
    expected = stated.main_norm(output)

    assert model.mtp is not None
    hidden = model.mtp.hidden(output)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    for form in (Form.PREFILL, Form.DECODE):
        cache = model.mtp.new_cache(len(BLOCKS), 4)
        rows = attention_rows([Span(BLOCKS, 0, TOKENS, form)], 4, model.cos, model.sin)
        ours, theirs = hidden, expected
        for _ in range(3):  # drafts of drafts
            ours = model.mtp.forward(ours, tokens, rows, cache, experts)
            theirs, logits = stated.predict(theirs, tokens)
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model.mtp.logits(ours), logits, atol=1e-4, rtol=1e-4)


def test_a_layer_that_is_not_whole_is_named(tmp_path: Path):
    make_checkpoint(tmp_path, mtp=True, change=lambda tensors: tensors.pop("model.layers.3.hnorm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.hnorm\.weight is missing"):
        Checkpoint.open(tmp_path).drafting("mtp")
