"""Published layouts, against what their own libraries unpack, or against their statement."""

from __future__ import annotations

from typing import Any

import pytest
import quantised_checkpoints as published
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isotherm.kernels.formats import published as published_formats
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


def every_mxfp4(rows: int, groups: int) -> dict[str, Tensor]:
    """With every number and every power of two in it."""
    packed = torch.arange(rows * groups * 16).view(rows, -1) % 256
    return {"packed": packed.to(torch.uint8), "scale": (torch.arange(rows * groups).view(rows, -1) % 256).byte()}


def stated_mxfp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Made at once, in float32."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).int()
    powers = torch.where(scale == 255, torch.nan, torch.exp2(scale.double() - 127)).float()
    signed = torch.cat([magnitudes, -magnitudes])[codes]
    return (signed * powers.repeat_interleave(32, 1)).to(torch.bfloat16)


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 20])
def test_mxfp4_is_the_same_in_parts(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(published_formats, "AT_ONCE", at_once)
    tensors = every_mxfp4(67, 4)
    (data,) = stored_weight("mxfp4", tensors, {}).tensors
    assert torch.equal(data.view(torch.int16), stated_mxfp4(**tensors).view(torch.int16))


class Made(TorchDispatchMode):
    """Where in memory the operations' results begin, and the bytes that are held there."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            self.storages.append((storage.data_ptr(), storage.nbytes()))
        return result


def test_mxfp4_takes_little_more_than_its_result(monkeypatch: pytest.MonkeyPatch):
    """An expert's weight took 18 times its stored bytes while it was made, and several are made at once."""
    monkeypatch.setattr(published_formats, "AT_ONCE", 1 << 12)
    tensors = every_mxfp4(512, 8)
    with Made() as made:
        (data,) = stored_weight("mxfp4", tensors, {}).tensors
    there = {t.untyped_storage().data_ptr() for t in (data, *tensors.values())}
    largest = max(nbytes for at, nbytes in made.storages if at not in there)
    assert made.storages and largest <= data.nbytes / 16


@pytest.mark.parametrize(("inputs", "groups"), [(48, 2), (16, 1), (64, 3)])
def test_mxfp4_whose_last_group_is_not_whole_is_refused(inputs: int, groups: int):
    tensors = {"packed": torch.zeros(4, inputs // 2).byte(), "scale": torch.zeros(4, groups).byte()}
    with pytest.raises(
        ValueError, match=rf"has {inputs} inputs to each of 4 outputs, and scales of shape \[4, {groups}\]"
    ):
        stored_weight("mxfp4", tensors, {})


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
