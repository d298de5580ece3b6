"""FP8 blocks against the format's plainest writing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isotherm.kernels.formats.fp8 import BLOCK, Fp8Weight
from isotherm.kernels.formats.stored import PlainWeight


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 128), (128, 129), (300, 200), (5, 400)])
def test_dequantised_blocks_have_their_own_scales(shape: tuple[int, int]):
    rows, columns = shape
    data = normal(*shape).to(torch.float8_e4m3fn)
    scale = 1.0 + torch.arange(-(-rows // BLOCK) * -(-columns // BLOCK), dtype=torch.float32).view(
        -(-rows // BLOCK), -1
    )
    weight = Fp8Weight(data, scale).dequantise(torch.float32)
    for i in {0, rows // 2, rows - 1, min(127, rows - 1), min(128, rows - 1)}:
        for j in {0, columns // 2, columns - 1, min(127, columns - 1), min(128, columns - 1)}:
            assert weight[i, j] == data[i, j].float() * scale[i // 128, j // 128]
    assert Fp8Weight(data, scale).nbytes == rows * columns + 4 * scale.numel()


def test_scales_are_applied_in_float32():
    data, scale = normal(64, 64).to(torch.float8_e4m3fn), torch.full((1, 1), 0.3)
    weight = Fp8Weight(data, scale).dequantise(torch.bfloat16)
    assert torch.equal(weight, (data.float() * 0.3).to(torch.bfloat16))
    assert not torch.equal(weight, data.to(torch.bfloat16) * scale.to(torch.bfloat16)), (
        "the values must tell the two apart"
    )


@pytest.mark.parametrize("shape", [(128, 256), (200, 130), (1, 3)])
def test_quantised_weights_are_near_and_of_the_stored_form(shape: tuple[int, int]):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(torch.bfloat16)
    weight[0] = 0
    quantised = Fp8Weight.quantise(PlainWeight(weight))
    assert quantised.data.dtype == torch.float8_e4m3fn
    assert quantised.scale.shape == tuple(-(-n // BLOCK) for n in shape)
    # Three bits of mantissa: half a step is a sixteenth; what is small beside the block's largest loses more.
    torch.testing.assert_close(
        quantised.dequantise(torch.float32), weight.float(), rtol=1 / 16, atol=float(weight.abs().max()) / 448 * 2**-9
    )
    assert Fp8Weight.quantise(quantised) is quantised


def test_rows_and_transposes_stay_fp8_where_no_block_is_cut():
    weight = Fp8Weight(normal(300, 200).to(torch.float8_e4m3fn), 1 + torch.arange(6.0).view(3, 2))
    exact = weight.dequantise(torch.float32)
    for begin, end, kept in ((0, 128, True), (128, 300, True), (128, 200, False), (5, 128, False)):
        rows = weight.rows(begin, end, torch.float32)
        assert isinstance(rows, Fp8Weight) is kept and rows.shape == (end - begin, 200)
        assert torch.equal(rows.dequantise(torch.float32), exact[begin:end])
    turned = weight.transpose(torch.float32)
    assert turned.shape == (200, 300) and torch.equal(turned.dequantise(torch.float32), exact.T)


@pytest.mark.parametrize(("size", "kept"), [(128, True), (256, True), (96, False), (384, True), (192, False)])
def test_parts_are_cut_out_of_one_dequantised_matrix_where_they_cannot_stay_fp8(
    size: int, kept: bool, monkeypatch: pytest.MonkeyPatch
):
    """As the heads of GLM-4.7-Flash, of 448 rows each: the whole matrix was dequantised for each, and each kept it."""
    weight = Fp8Weight(normal(384, 200).to(torch.float8_e4m3fn), 1 + torch.arange(6.0).view(3, 2))
    exact, dequantise, calls = weight.dequantise(torch.bfloat16), Fp8Weight.dequantise, []

    def counted(self: Fp8Weight, dtype: torch.dtype) -> Tensor:
        calls.append(self.shape)
        return dequantise(self, dtype)

    monkeypatch.setattr(Fp8Weight, "dequantise", counted)
    parts = weight.cut(size, torch.bfloat16)
    assert calls == ([] if kept else [(384, 200)])
    assert {type(part) for part in parts} == {Fp8Weight if kept else PlainWeight}
    assert [part.shape for part in parts] == [(min(size, 384 - b), 200) for b in range(0, 384, size)]
    assert torch.equal(torch.cat([part.dequantise(torch.bfloat16) for part in parts]), exact)


def test_other_tensors_are_refused():
    with pytest.raises(ValueError, match=r"scales have shape \(1, 1\); an FP8 weight \(130, 64\) needs \(2, 1\)"):
        Fp8Weight(torch.zeros(130, 64).to(torch.float8_e4m3fn), torch.ones(1, 1))
    with pytest.raises(TypeError, match="an FP8 weight is torch.bfloat16"):
        Fp8Weight(torch.zeros(2, 2, dtype=torch.bfloat16), torch.ones(1, 1))
    with pytest.raises(TypeError, match="a plain weight is torch.float8_e4m3fn"):
        PlainWeight(torch.zeros(2, 2).to(torch.float8_e4m3fn))
