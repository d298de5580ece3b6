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
from isotherm.cluster.model.formats.mxfp4 import Mxfp4
from isotherm.cluster.model.registry import parse

FP8_GROUP = {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}}


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
        (published.compressed_config() | {"config_groups": {"a": FP8_GROUP}}, CompressedFp8Blocks()),
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
