"""Published layouts, against what their own libraries unpack, or against their statement."""

from __future__ import annotations

import pytest
import quantised_checkpoints as published
import torch
from torch import Tensor

from isotherm.kernels.formats.grouped import Int4Weight
from isotherm.kernels.formats.published import packed_words, packed_zeros, unpacked_words
from isotherm.kernels.formats.registry import stored_weight


def weight(rows: int, inputs: int) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [12, 24])
def test_compressed_tensors_unpacks_the_same(rows: int, group: int, symmetric: bool):
    parts, numbers = published.compressed(weight(rows, 256), group, symmetric)
    tensors = {"packed": parts["weight_packed"], "scale": parts["weight_scale"], "shape": parts["weight_shape"]}
    if not symmetric:
        tensors["zero"] = parts["weight_zero_point"]
    found = stored_weight("pack-quantized", tensors, {"group_size": group})
    assert isinstance(found, Int4Weight) and found.group == group and (found.zeros is None) == symmetric
    assert torch.equal(found.dequantise(torch.float32), numbers)
    # and back: what is written is what the library has written
    assert torch.equal(packed_words(found.nibbles), parts["weight_packed"])
    if found.zeros is not None:
        assert torch.equal(packed_zeros(found.zeros), parts["weight_zero_point"])


@pytest.mark.parametrize("less", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_gptq(group: int, symmetric: bool, less: int):
    parts, numbers = published.gptq(weight(24, 256), group, symmetric, less)
    tensors = dict(zip(("packed", "zero", "scale", "index"), parts.values(), strict=True))
    found = stored_weight("gptq", tensors, {"group_size": group, "zero_offset": less})
    assert isinstance(found, Int4Weight) and found.group == group and (found.zeros is None) == symmetric
    assert torch.equal(found.dequantise(torch.float32), numbers)


def test_a_zero_point_of_0_stored_less_one_is_15():
    parts, _ = published.gptq(weight(8, 32))
    parts["qzeros"] = torch.full_like(parts["qzeros"], -1)
    tensors = dict(zip(("packed", "zero", "scale", "index"), parts.values(), strict=True))
    found = stored_weight("gptq", tensors, {"group_size": 32, "zero_offset": 1})
    assert isinstance(found, Int4Weight) and found.zeros is not None and not found.zeros.any()


def test_mxfp4_is_exact_in_bfloat16():
    parts, numbers = published.mxfp4(weight(6, 96) * torch.logspace(-9, 9, 6)[:, None])
    tensors = {"packed": parts["weight_packed"], "scale": parts["weight_scale"]}
    found = stored_weight("mxfp4", tensors, {})
    (data,) = found.tensors
    assert data.dtype == torch.bfloat16 and torch.equal(data.float(), numbers) and len(data.unique()) > 30


def test_act_order_is_refused():
    parts, _ = published.gptq(weight(8, 64))
    tensors = dict(zip(("packed", "zero", "scale", "index"), parts.values(), strict=True))
    tensors["index"] = tensors["index"].flip(0)
    with pytest.raises(ValueError, match="act-order"):
        stored_weight("gptq", tensors, {"group_size": 32, "zero_offset": 1})


def test_a_shape_that_the_packed_tensor_has_not_is_refused():
    parts, _ = published.compressed(weight(8, 64))
    tensors = {"packed": parts["weight_packed"], "scale": parts["weight_scale"], "shape": torch.tensor([8, 128])}
    with pytest.raises(ValueError, match=r"weight_shape is \[8, 128\], and weight_packed has shape \[8, 8\]"):
        stored_weight("pack-quantized", tensors, {"group_size": 32})


def test_zero_points_that_fill_no_word():
    zeros = torch.randint(0, 16, (13, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    assert torch.equal(unpacked_words(packed_zeros(zeros))[:13], zeros)
