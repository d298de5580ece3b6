"""What quantization_config may say, by format, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import quantised_checkpoints as published
from deepseek_checkpoints import make_config

from isotherm.cluster.model.config import ModelConfigError
from isotherm.cluster.model.formats.base import WeightFormat
from isotherm.cluster.model.formats.compressed import PackQuantized, in_order
from isotherm.cluster.model.formats.fp8 import CompressedFp8Blocks
from isotherm.cluster.model.formats.gptq import Gptq
from isotherm.cluster.model.formats.int8 import Int8Groups
from isotherm.cluster.model.formats.mxfp4 import Mxfp4
from isotherm.cluster.model.registry import parse

FP8_GROUP = {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}}
INT8_GROUP = {"weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}}
O_PROJ = "model.layers.0.self_attn.o_proj"


def by_layer(layer: str = O_PROJ, **said: Any) -> dict[str, Any]:
    """As Intel's int4-mixed checkpoints have it."""
    return published.AUTO_ROUND_CONFIG | {"extra_config": {layer: said}}


def in_groups(group: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return published.compressed_config() | {"config_groups": {"a": group}} | fields


def quantisation(said: dict[str, Any]) -> WeightFormat:
    found = parse(make_config() | {"quantization_config": said}).quantisation
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (published.compressed_config(), PackQuantized(32)),
        (published.compressed_config(128, actorder="static"), PackQuantized(128)),
        (published.gptq_config(128), Gptq(128, 1)),
        (published.gptq_config(128, checkpoint_format="gptq_v2", desc_act=True), Gptq(128, 0)),
        (published.AUTO_ROUND_CONFIG | {"group_size": 128}, Gptq(128, 1)),
        (published.AUTO_ROUND_CONFIG | {"packing_format": "auto_round:gptqmodel"}, Gptq(32, 0)),
        (published.MXFP4_CONFIG, Mxfp4()),
        (published.QUARK_CONFIG, Mxfp4()),
        (in_groups(FP8_GROUP), CompressedFp8Blocks()),
        (by_layer("lm_head", bits=16, data_type="float"), Gptq(32, 1)),
        (by_layer(bits=4, group_size=32, sym=False), Gptq(32, 1)),
        (by_layer(bits=None, act_bits=16), Gptq(32, 1)),
        (
            published.gptq_config(dynamic={"-:.*self_attn.*": {"bits": 8}, ".*mlp.*": {}, "+:.*": {"bits": 4}}),
            Gptq(32, 1),
        ),
        (in_groups(INT8_GROUP, format="int-quantized"), Int8Groups()),
        (in_groups(INT8_GROUP, format="mixed-precision"), Int8Groups()),
        (in_groups(INT8_GROUP | {"format": "int-quantized"}), Int8Groups()),
    ],
)
def test_what_is_read(said: dict[str, Any], expected: WeightFormat):
    found = quantisation(said)
    assert isinstance(found, type(expected)) and found.parameters == expected.parameters


def test_weights_in_8_bits_may_stand_beside():
    said = published.compressed_config()
    said["config_groups"]["group_1"] = FP8_GROUP
    assert quantisation(said) == PackQuantized(32)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (published.compressed_config(num_bits=3), "config_groups.group_0.weights: num_bits is 3; it must be 4"),
        (published.compressed_config(16), "weights: group_size is 16; it must be 32 or 64 or 128"),
        (published.compressed_config(strategy="channel"), 'strategy is "channel"; it must be "group"'),
        (published.compressed_config(actorder="group"), 'actorder is "group"; it must be null, or an order that'),
        (published.compressed_config() | {"config_groups": {}}, "config_groups is {}; it must be an object with at"),
        (published.gptq_config(bits=8), "bits is 8; it must be 4"),
        (published.gptq_config(checkpoint_format="marlin"), 'checkpoint_format is "marlin"; it must be "gptq" or'),
        (published.AUTO_ROUND_CONFIG | {"packing_format": "auto_round:auto_awq"}, 'is "auto_round:auto_awq"; it must'),
        (by_layer(bits=8), f"config: extra_config: {O_PROJ}: bits is 8; it must be 4, or 16 and above"),
        (by_layer(group_size=64), f"extra_config: {O_PROJ}: group_size is 64; it must be 32, as in the other layers"),
        (by_layer(data_type="mx_fp"), f'extra_config: {O_PROJ}: data_type is "mx_fp"; it must be "int"'),
        (published.AUTO_ROUND_CONFIG | {"extra_config": {O_PROJ: 8}}, f"{O_PROJ} is 8; it must be an object"),
        (published.gptq_config(dynamic={"+:.*[13]": {"bits": 8}}), "dynamic: +:.*[13]: bits is 8; it must be 4, or 16"),
        (published.gptq_config(dynamic=[1]), "dynamic is [1]; it must be null or an object"),
        (
            in_groups(INT8_GROUP),
            'config: format is "pack-quantized"; it must be "int-quantized" or "mixed-precision" where integers have 8',
        ),
        (
            in_groups(INT8_GROUP | {"format": "pack-quantized"}, format="int-quantized"),
            'config_groups.a: format is "pack-quantized"; it must be "int-quantized" where integers have 8 bits',
        ),
        (
            published.QUARK_CONFIG | {"global_quant_config": {"weight": {"dtype": "int4", "group_size": 32}}},
            'global_quant_config.weight: dtype is "int4"; it must be "fp4"',
        ),
    ],
)
def test_what_is_refused(said: dict[str, Any], message: str):
    with pytest.raises(ModelConfigError) as caught:
        quantisation(said)
    assert message in str(caught.value)


def test_rotations_are_refused():
    """As SpinQuant's and QuIP's checkpoints have them: what they rotate online, nothing here would."""
    groups = {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}
    said = published.compressed_config() | {"transform_config": {"config_groups": groups}}
    with pytest.raises(
        ModelConfigError, match=r"transform_config is .*hadamard.*; it must be null or empty: rotations"
    ):
        quantisation(said)
    for none in (None, {}, {"config_groups": {}}):
        assert quantisation(said | {"transform_config": none}) == PackQuantized(32)


def test_activations_of_fixed_scales_are_refused():
    said = published.compressed_config()
    said["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": False}
    with pytest.raises(ModelConfigError, match="group_0: input_activations is .*; it must be null, or dynamic"):
        quantisation(said)


def test_order_of_inputs():
    def index(*groups: int) -> bytes:
        return b"".join(group.to_bytes(4, "little") for group in groups)

    assert in_order(index(*[0] * 32, *[1] * 32), 32)
    assert not in_order(index(*[0] * 31, 1, 0, *[1] * 31), 32)
