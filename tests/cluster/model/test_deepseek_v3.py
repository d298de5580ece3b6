from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_config, make_tensors
from hypothesis import given
from hypothesis import strategies as st
from published import DEEPSEEK_V3

from isotherm.cluster.model.config import ModelConfigError, RopeConfig, token_ids
from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config
from isotherm.cluster.model.formats.fp8 import Fp8Blocks
from isotherm.cluster.model.registry import FAMILIES, parse
from isotherm.cluster.model.tensors import Part

KNOWN = " or ".join(f'"{family}"' for family in FAMILIES)
YARN = {
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}


def changed(**fields: Any) -> dict[str, Any]:
    return make_config(fields)


def without(*names: str) -> dict[str, Any]:
    return {k: v for k, v in make_config().items() if k not in names}


def test_every_field_is_read_from_its_own_name():
    config = parse(
        make_config({"num_nextn_predict_layers": 1, "eos_token_id": [1, 5]}, rope=YARN, fp8=True, dtype="float16")
    )
    assert config == DeepseekV3Config(
        model_type="deepseek_v3", vocab_size=300,
        hidden_size=56, intermediate_size=88, num_hidden_layers=3, num_attention_heads=3,
        q_lora_rank=26, kv_lora_rank=32, qk_nope_head_dim=14, qk_rope_head_dim=8, v_head_dim=18, attention_bias=False,
        rms_norm_eps=1e-6, max_position_embeddings=4096, tie_word_embeddings=False,
        rope=RopeConfig(theta=10000.0, yarn_factor=40.0, original_max_position=4096, beta_fast=32.0, beta_slow=1.0,
                        mscale=1.0, mscale_all_dim=0.5),
        first_k_dense_replace=1, moe_layer_freq=1, moe_intermediate_size=36, n_routed_experts=12, n_shared_experts=1,
        num_experts_per_tok=3, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
        num_nextn_predict_layers=1, quantisation=Fp8Blocks(), stored_dtype="float16", eos_token_ids=(1, 5),
    )  # fmt: skip
    assert (config.qk_head_dim, config.cache_bytes(4, "auto")) == (22, 160)


SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size", "n_routed_experts",
    "num_experts_per_tok",
}  # fmt: skip
# Fields that transformers' class has not, or under another name.
OWN_NAMES = {"rope", "quantisation", "stored_dtype", "eos_token_ids", "moe_layer_freq", "drafting_layers"}


def test_fields_that_may_be_absent_have_the_defaults_of_transformers():
    """Every field of DeepseekV3Config: it is a size that must be there, or its default is that of the reference
    implementation."""
    from transformers import DeepseekV3Config as Theirs

    sizes = {name: DEEPSEEK_V3[name] for name in SIZES}
    ours, theirs = parse({"model_type": "deepseek_v3", **sizes}), Theirs(**sizes)
    compared = {field.name for field in fields(DeepseekV3Config)} - OWN_NAMES
    assert {name: getattr(ours, name) for name in compared} == {name: getattr(theirs, name) for name in compared}
    deciding = {"n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace", "n_shared_experts"}
    assert compared - SIZES >= deciding | {"q_lora_rank", "norm_topk_prob", "rms_norm_eps"}
    assert ours.eos_token_ids == (theirs.eos_token_id,) and ours.rope == RopeConfig(
        theirs.rope_parameters["rope_theta"]
    )
    assert theirs.rope_parameters["rope_type"] == "default" and theirs.rope_interleave and theirs.hidden_act == "silu"
    # What only DeepSeek's own class has; transformers computes as if each had this value.
    assert ours.moe_layer_freq == 1 and ours.quantisation is None and ours.stored_dtype == "bfloat16"


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_size_that_is_missing_is_named(name: str):
    with pytest.raises(ModelConfigError, match=rf"^c\.json: {name} is missing; it must be an integer of at least 1$"):
        parse(without(name), "c.json")


def test_a_default_that_does_not_fit_says_that_it_is_one():
    words = r"n_group is missing, which means 8; it must be a divisor of n_routed_experts \(12\)$"
    with pytest.raises(ModelConfigError, match=words):
        parse(without("n_group"), "c.json")


def test_null_is_no_value_but_where_the_reference_computes_with_it():
    allowed = ("q_lora_rank", "num_nextn_predict_layers", "eos_token_id", "rope_theta", "rope_scaling", "torch_dtype",
               "quantization_config", "n_shared_experts")  # fmt: skip
    config = parse(changed(**dict.fromkeys(allowed)))
    assert config.q_lora_rank is None and config.quantisation is None and config.n_shared_experts == 0
    assert (config.eos_token_ids, config.rope) == ((), RopeConfig(10000.0))
    for name in [
        n for n in make_config() if n not in (*allowed, "architectures", "num_key_value_heads", "bos_token_id")
    ]:
        with pytest.raises(ModelConfigError, match=rf"{name} is null; it must be "):
            parse(changed(**{name: None}))


def test_unknown_fields_and_remote_code_are_ignored():
    extra = {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "trust_remote_code": True,
        "aux_loss_alpha": "odd",
    }
    assert parse(changed(**extra)) == parse(make_config())


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("model_type", "deepseek", KNOWN),
        ("model_type", None, KNOWN),
        ("model_type", ["deepseek_v3"], KNOWN),
        ("hidden_act", "gelu", '"silu"'),
        ("scoring_func", "softmax", '"sigmoid"'),
        ("topk_method", "greedy", '"noaux_tc"'),
        ("rope_interleave", False, "true"),
        ("vocab_size", 0, "an integer of at least 1"),
        ("vocab_size", None, "an integer of at least 1"),
        ("hidden_size", "56", "an integer of at least 1"),
        ("hidden_size", 56.0, "an integer of at least 1"),
        ("intermediate_size", -1, "an integer of at least 1"),
        ("moe_intermediate_size", [36], "an integer of at least 1"),
        ("num_hidden_layers", True, "an integer of at least 1"),
        ("num_hidden_layers", math.inf, "an integer of at least 1"),
        ("num_attention_heads", 0, "an integer of at least 1"),
        ("q_lora_rank", 0, "an integer of at least 1"),
        ("kv_lora_rank", None, "an integer of at least 1"),
        ("qk_nope_head_dim", 0, "an integer of at least 1"),
        ("qk_rope_head_dim", 7, "even"),
        ("v_head_dim", {}, "an integer of at least 1"),
        ("n_routed_experts", None, "an integer of at least 1"),
        ("n_shared_experts", -1, "an integer of at least 0"),
        ("first_k_dense_replace", -1, "an integer of at least 0"),
        ("moe_layer_freq", 0, "an integer of at least 1"),
        ("num_nextn_predict_layers", -1, "an integer of at least 0"),
        ("max_position_embeddings", 0, "an integer of at least 1"),
        ("n_group", 5, "a divisor of n_routed_experts (12)"),
        ("topk_group", 5, "at most n_group (4)"),
        ("num_experts_per_tok", 7, "at most the experts in topk_group groups (6)"),
        ("num_experts_per_tok", 0, "an integer of at least 1"),
        ("attention_bias", "false", "true or false"),
        ("tie_word_embeddings", 1, "true or false"),
        ("norm_topk_prob", "yes", "true or false"),
        ("rms_norm_eps", -1e-6, "a number of at least 0"),
        ("rms_norm_eps", "1e-6", "a number of at least 0"),
        ("routed_scaling_factor", math.nan, "a number of at least 0"),
        ("routed_scaling_factor", math.inf, "a number of at least 0"),
        ("routed_scaling_factor", 10**400, "a number of at least 0"),
        ("rope_theta", 0, "a number above 1"),
        ("rope_theta", 1, "a number above 1"),
        ("rope_theta", "1e4", "a number of at least 0"),
        ("rope_scaling", "yarn", "null or an object"),
        ("rope_parameters", [1], "null or an object"),
        ("quantization_config", "fp8", "null or an object"),
        ("eos_token_id", -1, "a token id or a list of token ids"),
        ("eos_token_id", "1", "a token id or a list of token ids"),
        ("eos_token_id", [1, None], "a token id or a list of token ids"),
        ("eos_token_id", True, "a token id or a list of token ids"),
        ("eos_token_id", 1.0, "a token id or a list of token ids"),
    ],
    ids=lambda v: None if isinstance(v, str) else str(v)[:12],
)
def test_a_bad_value_is_an_error_that_names_file_field_value_and_what_is_allowed(field: str, value: Any, allowed: str):
    with pytest.raises(ModelConfigError) as caught:
        parse(changed(**{field: value}), "/models/x/config.json")
    message = str(caught.value)
    assert message.startswith(f"/models/x/config.json: {field} is ") and message.endswith(f"it must be {allowed}")
    assert (json.dumps(value) in message) or (str(value) in message)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("rope_type", "linear", '"default" or "yarn"'),
        ("rope_type", 5, '"default" or "yarn"'),
        ("factor", 0.5, "a number of at least 1"),
        ("factor", None, "a number of at least 1"),
        ("original_max_position_embeddings", 0, "an integer of at least 1"),
        ("beta_fast", -1, "a number of at least 0"),
        ("beta_slow", "1", "a number of at least 0"),
        ("mscale", math.nan, "a number of at least 0"),
        ("mscale_all_dim", True, "a number of at least 0"),
        ("truncate", 1, "true or false"),
        ("attention_factor", -1, "a number of at least 0"),
    ],
)
@pytest.mark.parametrize("style", ["old", "new"])
def test_a_bad_rope_value_names_where_it_stands(style: str, field: str, value: Any, allowed: str):
    name = "rope_scaling" if style == "old" else "rope_parameters"
    with pytest.raises(ModelConfigError) as caught:
        parse(make_config(rope={**YARN, field: value}, rope_style=style), "c.json")
    message = str(caught.value)
    assert message.startswith(f"c.json: {name}: {field} is {json.dumps(value)}") and message.endswith(
        f"it must be {allowed}"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"quant_method": "awq"},
            'quant_method is "awq"; it must be "fp8" or "compressed-tensors" or "gptq" or "auto-round" or '
            '"intel/auto-round" or "quark"',
        ),
        ({"fmt": "e5m2"}, 'fmt is "e5m2"; it must be "e4m3"'),
        ({"weight_block_size": [64, 128]}, "weight_block_size is [64, 128]; it must be [128, 128]"),
        ({"weight_block_size": None}, "weight_block_size is null; it must be [128, 128]"),
    ],
)
def test_other_quantisations_are_refused(change: dict[str, Any], message: str):
    raw = make_config(fp8=True)
    raw["quantization_config"] |= change
    with pytest.raises(ModelConfigError) as caught:
        parse(raw, "c.json")
    assert str(caught.value) == f"c.json: quantization_config: {message}"


@pytest.mark.parametrize(
    "rope", [None, YARN, {"factor": 2, "truncate": False, "attention_factor": 1.5}], ids=["plain", "yarn", "yarn-short"]
)
def test_old_and_new_rope_writing_are_equal(rope: dict[str, Any] | None):
    old, new = (parse(make_config(rope=rope, rope_style=style, dtype="float32")) for style in ("old", "new"))
    assert old == new
    assert (old.rope.yarn_factor is None) == (rope is None)


def test_yarn_without_an_original_length_takes_the_models():
    assert parse(make_config({"max_position_embeddings": 8192}, rope={"factor": 2})).rope.original_max_position == 8192


def test_theta_is_read_from_either_place():
    for raw in (
        changed(rope_theta=5e4),
        make_config(rope_style="new") | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    ):
        assert parse(raw).rope.theta == 5e4
    assert (
        parse(
            make_config(rope_style="new") | {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e4}
        ).rope.theta
        == 5e4
    )


@pytest.mark.parametrize(
    ("mscale", "all_dim", "magnitude", "softmax"),
    [
        (1.0, 1.0, 1.0, (1 + 0.1 * math.log(40)) ** 2),
        (1.0, 0.5, (1 + 0.1 * math.log(40)) / (1 + 0.05 * math.log(40)), (1 + 0.05 * math.log(40)) ** 2),
        (0.7, 0.0, 1 + 0.1 * math.log(40), 1.0),
        (0.0, 0.7, 1 + 0.1 * math.log(40), (1 + 0.07 * math.log(40)) ** 2),
    ],
)
def test_mscales_go_into_magnitude_and_softmax_scale(mscale: float, all_dim: float, magnitude: float, softmax: float):
    config = parse(make_config(rope={**YARN, "mscale": mscale, "mscale_all_dim": all_dim}))
    assert config.rope.magnitude == pytest.approx(magnitude, rel=1e-12)
    assert config.softmax_scale == pytest.approx(22**-0.5 * softmax, rel=1e-12)


def test_plain_rope_and_factor_one_scale_nothing():
    for config in (parse(make_config()), parse(make_config(rope={**YARN, "factor": 1.0}))):
        assert (config.rope.magnitude, config.softmax_scale) == (1.0, 22**-0.5)


def test_an_attention_factor_stands_for_the_magnitude():
    assert parse(make_config(rope={**YARN, "attention_factor": 1.25})).rope.magnitude == 1.25


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (7, (7,)), (0, (0,)), ([], ()), ([3, 1], (3, 1))])
def test_token_ids_may_be_null_one_or_several(value: Any, ids: tuple[int, ...]):
    assert token_ids({"eos_token_id": value}, "eos_token_id", "c.json") == ids
    assert parse(changed(eos_token_id=value)).eos_token_ids == ids
    assert token_ids({}, "eos_token_id", "c.json") == ()


@given(layers=st.integers(1, 9), first=st.integers(0, 9), every=st.integers(1, 4))
def test_moe_layers_are_those_that_deepseeks_model_makes(layers: int, first: int, every: int):
    config = parse(changed(num_hidden_layers=layers, first_k_dense_replace=first, moe_layer_freq=every))
    assert config.moe_layers == tuple(i for i in range(layers) if i >= first and i % every == 0)
    assert all(config.is_moe(i) == (i in config.moe_layers) for i in range(layers))
    assert config.is_moe(layers), "the MTP layer has routed experts"


@pytest.mark.parametrize(
    ("torch_dtype", "dtype", "stored"),
    [("torch.float16", None, "float16"), (None, "float32", "float32"), (None, None, "bfloat16")],
)
def test_the_stored_dtype_is_read_from_either_name(torch_dtype: str | None, dtype: str | None, stored: str):
    assert parse(changed(torch_dtype=torch_dtype, dtype=dtype)).stored_dtype == stored


# --- tensors --------------------------------------------------------------------------------------


ARCHITECTURES: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": None, "attention_bias": True},
    {"attention_bias": True, "n_shared_experts": 2, "n_group": 1, "topk_group": 1},
    {"first_k_dense_replace": 0, "tie_word_embeddings": True},
    {"first_k_dense_replace": 3, "v_head_dim": 10},
    {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 2, "n_routed_experts": 8},
]


@pytest.mark.parametrize("overrides", ARCHITECTURES)
def test_expected_tensors_are_those_of_transformers(overrides: dict[str, Any]):
    """transformers stacks a layer's experts; here they are taken apart into the hub's names."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    raw = make_config(overrides)
    with torch.device("meta"):
        state = DeepseekV3ForCausalLM(DeepseekV3Config(**raw)).state_dict()
    theirs: dict[str, tuple[int, ...]] = {}
    for name, tensor in state.items():
        prefix, stacked, part = name.partition(".experts.")
        if not stacked:
            theirs[name] = tuple(tensor.shape)
            continue
        for e, one in enumerate(tensor):
            halves = (
                dict(zip(("gate_proj", "up_proj"), one.chunk(2), strict=True))
                if part == "gate_up_proj"
                else {part: one}
            )
            theirs |= {f"{prefix}.experts.{e}.{p}.weight": tuple(t.shape) for p, t in halves.items()}
    if raw["tie_word_embeddings"]:
        theirs.pop("lm_head.weight", None)
    assert {spec.name: spec.shape for spec in parse(raw).tensors()} == theirs


@pytest.mark.parametrize(
    "overrides",
    [
        *ARCHITECTURES,
        {"moe_layer_freq": 2, "num_hidden_layers": 5},
        {"moe_layer_freq": 2, "first_k_dense_replace": 0},
        {"n_shared_experts": 0},
    ],
)
def test_expected_tensors_are_those_of_the_hub(overrides: dict[str, Any]):
    raw = make_config(overrides)
    ours = [spec.name for spec in parse(raw).tensors()]
    assert len(set(ours)) == len(ours)
    assert {spec.name: spec.shape for spec in parse(raw).tensors()} == {
        n: tuple(t.shape) for n, t in make_tensors(raw).items()
    }


def test_what_may_be_fp8_is_what_deepseek_stores_so():
    raw = make_config(fp8=True)
    stored = {name for name, tensor in make_tensors(raw, fp8=True).items() if tensor.dtype == torch.float8_e4m3fn}
    assert {spec.name for spec in parse(raw).tensors() if spec.quantisable} == stored | {"lm_head.weight"}


def test_parts_of_the_model():
    config = parse(make_config())
    parts = {spec.name.replace("model.layers.", ""): spec.part for spec in config.tensors()}
    assert parts["model.embed_tokens.weight"] is Part.EMBEDDING
    assert parts["lm_head.weight"] is parts["model.norm.weight"] is Part.HEAD
    assert parts["0.mlp.up_proj.weight"] is Part.DENSE_MLP
    assert parts["1.mlp.gate.weight"] is parts["1.mlp.gate.e_score_correction_bias"] is Part.ROUTER
    assert parts["1.mlp.shared_experts.down_proj.weight"] is Part.SHARED_EXPERTS
    assert parts["2.mlp.experts.11.gate_proj.weight"] is Part.ROUTED_EXPERTS
    assert parts["2.self_attn.o_proj.weight"] is parts["2.input_layernorm.weight"] is Part.ATTENTION
    assert list(config.expert_tensors(2, 11)) == [s for s in config.layer_tensors(2) if ".experts.11." in s.name]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.gate.weight", 12),
        ("model.layers.3.enorm.weight", 3),
        ("model.layers.2.mlp.gate.weight", None),
        ("model.layers.0.enorm.weight", None),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
        ("model.layers.x.weight", None),
        ("model.layers.²³.weight", None),
        ("other.layers.1.weight", None),
    ],
)
def test_mtp_layers_are_those_behind_the_models_own(name: str, layer: int | None):
    assert parse(make_config()).mtp_layer(name) == layer


def test_what_an_mtp_layer_adds_is_what_the_hub_has():
    raw = make_config(mtp=True)
    again = ("embed_tokens.weight", "shared_head.head.weight")  # the model's own, stored again
    theirs = {n: tuple(t.shape) for n, t in make_tensors(raw).items() if n.startswith("model.layers.3.")}
    ours = {spec.name: spec.shape for spec in parse(raw).mtp_tensors(3)}
    assert ours == {name: shape for name, shape in theirs.items() if not name.endswith(again)}
