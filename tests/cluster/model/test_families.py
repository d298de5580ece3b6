"""What each relative of DeepSeek-V3 is read to be: published configs, and small checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import quantised_checkpoints as quantised
import torch
from deepseek_checkpoints import make_config, make_tensors
from family_checkpoints import make_family
from published import DEEPSEEK_V3
from published_families import DEEPSEEK_V32, GLM_4_7_FLASH, JOYAI_LLM_FLASH, KIMI_K2, KIMI_K25, MOONLIGHT
from safetensors.torch import load_file, save_file

from isotherm.cluster.deploy.inspect import inspect_model
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.model.checkpoint import Checkpoint, CheckpointError
from isotherm.cluster.model.config import ModelConfig, ModelConfigError
from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config
from isotherm.cluster.model.formats.compressed import PackQuantized
from isotherm.cluster.model.formats.fp8 import Fp8Blocks
from isotherm.cluster.model.registry import parse
from isotherm.kernels.formats.fp8 import Fp8Weight


def parameters(config: ModelConfig) -> int:
    return sum(math.prod(spec.shape) for spec in config.tensors())


@pytest.mark.parametrize(
    ("published", "billions", "label"),
    [
        (DEEPSEEK_V3, 671.0, "DeepSeek-V3"),
        (KIMI_K2, 1026, "Kimi K2"),
        (KIMI_K25, 1026, "Kimi K2.5"),
        (MOONLIGHT, 16.0, "DeepSeek-V3"),
        (GLM_4_7_FLASH, 29.9, "GLM-4.7-Flash"),
        (JOYAI_LLM_FLASH, 48, "JoyAI-LLM-Flash"),
        (DEEPSEEK_V32, 671.9, "DeepSeek-V3.2"),
    ],
    ids=["deepseek_v3", "kimi_k2", "kimi_k25", "moonlight", "glm4_moe_lite", "joyai_llm_flash", "deepseek_v32"],
)
def test_the_published_model_has_its_published_size(published: dict[str, Any], billions: float, label: str):
    config = parse(published)
    assert isinstance(config, DeepseekV3Config) and config.describe()["family"] == f"{label} ({config.model_type})"
    assert parameters(config) / 1e9 == pytest.approx(billions, rel=0.03)


def test_kimi_k2():
    config = parse(KIMI_K2)
    assert isinstance(config, DeepseekV3Config)
    assert (config.num_attention_heads, config.n_routed_experts, config.n_group, config.rms_norm_eps) == (
        64,
        384,
        1,
        1e-5,
    )
    assert (config.rope.theta, config.rope.yarn_factor, config.eos_token_ids) == (5e4, 32, (163586,))
    assert config.moe_layers == tuple(range(1, 61))


def test_kimi_k25_is_its_text_model_under_other_names(tmp_path: Path):
    config = parse(KIMI_K25)
    assert isinstance(config, DeepseekV3Config) and config.max_position_embeddings == 262144
    assert all(spec.name.startswith("language_model.") for spec in config.tensors())
    assert config.head == "language_model.lm_head.weight"
    outside = {**KIMI_K25, "eos_token_id": 7, "text_config": {**KIMI_K25["text_config"]}}
    del outside["text_config"]["eos_token_id"]
    assert parse(outside).eos_token_ids == (7,)
    report = inspect_model(make_family(tmp_path, "kimi_k25", {"n_group": 1, "topk_group": 1}), Manifest())
    assert report.architecture["not_supported"].startswith("images and video: the vision tower")


def test_of_two_quantisations_kimi_k25_has_the_outer_one():
    """As transformers and vLLM have it; one that is null is none."""
    inner = KIMI_K25["text_config"]
    assert type(parse(KIMI_K25).quantisation) is Fp8Blocks and inner["quantization_config"]
    both = {**KIMI_K25, "quantization_config": quantised.compressed_config()}
    assert parse(both).quantisation == PackQuantized(32)
    assert parse({**KIMI_K25, "quantization_config": None}).quantisation == parse(KIMI_K25).quantisation


@pytest.mark.parametrize("text", [None, [], "kimi"])
def test_kimi_k25_without_a_text_model_is_refused(text: Any):
    with pytest.raises(ModelConfigError, match="text_config is .*; it must be an object: the text model's config"):
        parse({**KIMI_K25, "text_config": text})


def test_an_error_in_a_text_config_says_where():
    with pytest.raises(ModelConfigError, match=r"c\.json: text_config: hidden_size is 0; it must be"):
        parse({**KIMI_K25, "text_config": {**KIMI_K25["text_config"], "hidden_size": 0}}, "c.json")


def test_moonlight_has_no_latent_of_queries():
    names = {spec.name for spec in parse(MOONLIGHT).tensors()}
    assert "model.layers.0.self_attn.q_proj.weight" in names and not any(".q_a_proj." in name for name in names)


def glm(**fields: Any) -> DeepseekV3Config:
    config = parse({**GLM_4_7_FLASH, **fields})
    assert isinstance(config, DeepseekV3Config)
    return config


def test_glms_layers_are_named_one_by_one():
    assert glm().eos_token_ids == (154820, 154827, 154829) and glm().moe_layers == tuple(range(1, 47))
    types = ["sparse", "dense"] * 23 + ["dense"]
    assert glm(mlp_layer_types=types).moe_layers == tuple(range(0, 46, 2))
    assert glm(mlp_layer_types=[*types, "sparse"]).moe_layers == tuple(range(0, 46, 2))  # the last is the MTP layer's
    assert glm(first_k_dense_replace=4).moe_layers == tuple(range(4, 47))
    assert glm().is_moe(47)


@pytest.mark.parametrize("types", [["dense"] * 46, ["dense"] * 46 + ["linear"], "dense", {}])
def test_glms_layers_must_all_be_named(types: Any):
    with pytest.raises(ModelConfigError, match='mlp_layer_types is .*; it must be "dense" or "sparse" for each of 47'):
        glm(mlp_layer_types=types)


def test_glms_defaults_are_those_of_transformers():
    from transformers import Glm4MoeLiteConfig as Theirs

    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size",
             "n_routed_experts", "num_experts_per_tok")  # fmt: skip
    ours = parse({"model_type": "glm4_moe_lite", **{name: GLM_4_7_FLASH[name] for name in sizes}})
    theirs = Theirs()
    for name in ("q_lora_rank", "rms_norm_eps", "max_position_embeddings", "n_group", "topk_group", "n_shared_experts",
                 "routed_scaling_factor", "norm_topk_prob", "attention_bias", "tie_word_embeddings"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.mlp_layer_types) == theirs.mlp_layer_types


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_part_of_the_rotary_dimensions_is_refused(where: str):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    for factor in (1, 1.0, None):
        fields = {"partial_rotary_factor": factor} if where == "outside" else {}
        inside = rope | ({"partial_rotary_factor": factor} if where == "inside" else {})
        assert glm(**fields, rope_parameters=inside, rope_scaling=None).rope.theta == 1e6
    fields = (
        {"partial_rotary_factor": 0.5}
        if where == "outside"
        else {"rope_parameters": rope | {"partial_rotary_factor": 0.5}}
    )
    with pytest.raises(ModelConfigError, match=r"partial_rotary_factor is 0\.5; it must be 1"):
        glm(**fields)


def test_joyai_is_deepseek_v3_by_another_name():
    config = parse(JOYAI_LLM_FLASH)
    assert isinstance(config, DeepseekV3Config) and config.rope.theta == 3.2e7 and config.moe_layers[0] == 1
    same = parse({**JOYAI_LLM_FLASH, "model_type": "deepseek_v3"})
    assert list(config.tensors()) == list(same.tensors())


def test_joyais_mtp_layer_is_dense():
    """arXiv:2604.03044, §2.1; and vLLM's and SGLang's code."""
    config = parse(JOYAI_LLM_FLASH)
    shapes = {spec.name.partition(".mlp.")[2]: spec.shape for spec in config.mtp_tensors(40) if ".mlp." in spec.name}
    inner, hidden = 7168, 2048
    assert shapes == {
        "gate_proj.weight": (inner, hidden), "up_proj.weight": (inner, hidden), "down_proj.weight": (hidden, inner)
    }  # fmt: skip
    drafting = replace(config, drafting_layers=1)
    assert drafting.moe_layers == config.moe_layers == tuple(range(1, 40)) and drafting.cache_layers == 41
    assert [spec for spec in drafting.loaded_tensors() if ".layers.40.mlp.experts." in spec.name] == []


def test_deepseek_v32_has_an_indexer_in_each_layer():
    config = parse(DEEPSEEK_V32)
    assert config.cache_bytes(2, "auto") == 2 * (576 + 128)
    assert config.cache_bytes(2, "fp8") == 512 + 2 * (64 + 1 + 128)  # the indexer's keys stay as they are
    assert config.describe()["sparse_attention"] == "2048 positions, by 64 heads of 128"
    shapes = {spec.name: spec.shape for spec in config.tensors() if ".3.self_attn.indexer." in spec.name}
    assert {name.rpartition("indexer.")[2]: shape for name, shape in shapes.items()} == {
        "wq_b.weight": (8192, 1536), "wk.weight": (128, 7168), "weights_proj.weight": (64, 7168),
        "k_norm.weight": (128,), "k_norm.bias": (128,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"q_lora_rank": None}, "q_lora_rank is null; it must be an integer: the indexer's queries"),
        ({"index_head_dim": 32}, r"index_head_dim is 32; it must be at least qk_rope_head_dim \(64\)"),
        ({"index_topk": 0}, "index_topk is 0; it must be an integer of at least 1"),
    ],
)
def test_an_indexer_that_cannot_be_is_refused(fields: dict[str, Any], words: str):
    with pytest.raises(ModelConfigError, match=words):
        parse({**DEEPSEEK_V32, **fields})


# --- checkpoints ------------------------------------------------------------------------------------


FAMILIES = ("kimi_k2", "kimi_k25", "moonlight", "glm4_moe_lite", "joyai_llm_flash", "deepseek_v32")


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_checkpoint_is_complete_and_its_mtp_layer_known(tmp_path: Path, family: str):
    overrides = {"mlp_layer_types": ["dense", "sparse", "sparse"]} if family == "glm4_moe_lite" else {}
    overrides |= {"index_topk": 24, "index_n_heads": 4, "index_head_dim": 12} if family == "deepseek_v32" else {}
    path = make_family(tmp_path, family, overrides, mtp=True)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.mtp_tensors() and all(".layers.3." in name for name in checkpoint.mtp_tensors())
    used = {name for spec in checkpoint.config.tensors() for name in checkpoint.tensors_of(spec.name, spec.quantisable)}
    beside = checkpoint.tensors.keys() - used - set(checkpoint.mtp_tensors())
    assert {name.split(".")[0] for name in beside} == (
        {"vision_tower", "mm_projector"} if family == "kimi_k25" else set()
    )
    named = {spec.name for spec in checkpoint.config.mtp_tensors(3)}
    assert named <= set(checkpoint.mtp_tensors())
    assert checkpoint.with_mtp().config.drafting_layers == 1, "it is whole"
    with pytest.raises(CheckpointError, match="layers.1.mlp.gate.weight is missing"):
        Checkpoint.open(rewritten(path, lambda tensors: [tensors.pop(n) for n in list(tensors) if "1.mlp.gate.w" in n]))


# --- FP8 as later checkpoints have it ---------------------------------------------------------------


@pytest.mark.parametrize("scales", ["ue8m0", "e8m0"])
def test_scales_that_are_powers_of_two(tmp_path: Path, scales: str):
    path = make_family(tmp_path, "moonlight", {"hidden_size": 136, "q_lora_rank": None}, fp8=True, scales=scales)
    checkpoint = Checkpoint.open(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert checkpoint.tensors[f"{name}_scale_inv"].dtype == ("F8_E8M0" if scales == "e8m0" else "F32")
    assert checkpoint.weight_format() == "FP8 e4m3, 128×128 blocks"
    tensors = load_file(path / "model.safetensors")
    data, scale = tensors[name], tensors[f"{name}_scale_inv"]
    weight = Fp8Weight(data, scale).dequantise(torch.float32)
    expected = data.float()
    expected[:, :128] *= float(scale[0, 0])
    expected[:, 128:] *= float(scale[0, 1])
    assert torch.equal(weight, expected) and float(scale[0, 0]).hex().startswith("0x1.0000000000000p")


FP8 = make_config(fp8=True)["quantization_config"]


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_fmt": "ue8m0"}, {"scale_fmt": None}, {"activation_scheme": "dynamic"}, {"activation_scheme": None},
        {"modules_to_not_convert": ["lm_head", "model.layers.0.self_attn"]}, {"modules_to_not_convert": None},
    ],
)  # fmt: skip
def test_what_config_json_may_say_of_fp8(fields: dict[str, Any]):
    assert parse(make_config({"quantization_config": FP8 | fields})) == parse(make_config(fp8=True))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scale_fmt": "e5m2"}, 'scale_fmt is "e5m2"; it must be "ue8m0" or "float" or null'),
        ({"activation_scheme": "static"}, 'activation_scheme is "static"; it must be "dynamic" or null'),
        ({"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]; it must be \[128, 128\]"),
        ({"weight_block_size": None}, r"weight_block_size is null; it must be \[128, 128\]"),
        ({"fmt": "e5m2"}, 'fmt is "e5m2"; it must be "e4m3"'),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is .*; it must be null or a list of the names"),
    ],
)
def test_what_of_fp8_is_refused(fields: dict[str, Any], words: str):
    with pytest.raises(ModelConfigError, match=f"quantization_config: {words}"):
        parse(make_config({"quantization_config": FP8 | fields}))


def test_a_module_that_was_not_converted_is_read_as_it_is_stored(tmp_path: Path):
    path = make_family(tmp_path, "moonlight", fp8=True)
    name = "model.layers.1.self_attn.o_proj.weight"

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{name}_scale_inv"]
        tensors[name] = tensors[name].to(torch.bfloat16)

    checkpoint = Checkpoint.open(rewritten(path, widen))
    assert checkpoint.format_of(name).name == "plain"
    assert checkpoint.format_of(name.replace("layers.1", "layers.0")).name == "fp8"


def test_make_tensors_knows_of_every_family():
    """The helper's own: what it makes of a list of layers is what the list says."""
    config = make_config({"mlp_layer_types": ["sparse", "dense", "sparse"]})
    tensors = make_tensors(config)
    assert [f"model.layers.{i}.mlp.gate.weight" in tensors for i in range(3)] == [True, False, True]
