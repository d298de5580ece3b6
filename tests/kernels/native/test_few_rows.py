"""Products whose kernels choose by the numbers of a row or by how many rows there are: the choice changes no bit."""

from __future__ import annotations

import pytest
import torch
from native_cases import native, runnable
from native_there import require_native
from weight_cases import BF16, F32, FP8, INTEGERS, randn, stored, taken

from isotherm.kernels.formats.fp8 import Fp8Weight

pytestmark = pytest.mark.slow

require_native()

COLUMNS = (2, 128, 130, 160, 256, 640)  # parts of a block of scales of 128 or 32, one, two at once, an odd one left
ROWS = (1, 2, 3, 4, 5, 6, 7, 13)


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("columns", COLUMNS)
def test_fp8_of_rows_of_any_size(isa: str, columns: int) -> None:
    """A row × 2^n gives the result × 2^n, also where numbers of 2^7 and more are multiplied otherwise."""
    kernels = native(BF16, 2, isa)
    weight = kernels.pack_linear([stored(64, columns, "fp8", seed=1)])
    x = randn(max(ROWS), columns, seed=2).to(BF16)
    for rows in ROWS:
        expected = kernels.linear(x[:rows], weight, F32)
        for power in (-20, 5, 6, 7, 8, 20):
            scaled = kernels.linear(torch.ldexp(x[:rows], torch.tensor(power)), weight, F32)
            assert torch.equal(scaled, torch.ldexp(expected, torch.tensor(power))), (rows, power)


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("power", [0, 9])  # numbers of 2^7 and more are multiplied otherwise
def test_an_fp8_weight_that_is_no_number_is_its_outputs_alone(isa: str, power: int) -> None:
    kernels = native(BF16, 2, isa)
    whole = stored(64, 130, "fp8", seed=7)
    assert isinstance(whole, Fp8Weight)
    codes = whole.data.view(torch.uint8).clone()
    spoilt = [0, 3, 17, 31, 40]
    codes[spoilt, torch.tensor([0, 129, 64, 1, 127])] = torch.tensor([0x7F, 0xFF, 0x7F, 0xFF, 0x7F], dtype=torch.uint8)
    packed = [kernels.pack_linear([w]) for w in (whole, Fp8Weight(codes.view(FP8), whole.scale))]
    x = torch.ldexp(randn(max(ROWS), 130, seed=8), torch.tensor(power)).to(BF16)
    for rows in ROWS:
        expected, seen = (kernels.linear(x[:rows], weight, F32) for weight in packed)
        expected[:, spoilt] = torch.nan
        torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_integers_of_rows_with_small_numbers_beside_large_ones(isa: str, kind: str, columns: int) -> None:
    """Inputs far below the largest count, in none, some and all of the words that share its scale, as far as they are
    in what is multiplied."""
    kernels = native(BF16, 2, isa)
    stored_weight = stored(64, columns, kind, seed=3)
    weight = kernels.pack_linear([stored_weight])
    powers = torch.randint(0, 15, (max(ROWS), columns), generator=torch.Generator().manual_seed(4))
    for share in (0.0, 0.1, 1.0):
        small = torch.rand(max(ROWS), columns, generator=torch.Generator().manual_seed(5)) < share
        x = torch.ldexp(1 + randn(max(ROWS), columns, seed=6).abs() % 1, -powers * small).to(BF16)
        rows_taken, numbers = taken(x, stored_weight, isa).double(), stored_weight.dequantise(F32).double()
        exact = rows_taken @ numbers.T
        together = kernels.linear(x, weight, F32)
        bound = 2**-20 * (rows_taken.abs() @ numbers.abs().T)
        assert ((together.double() - exact).abs() <= bound).all()
        for rows in ROWS:
            assert torch.equal(kernels.linear(x[:rows], weight, F32), together[:rows]), (share, rows)
