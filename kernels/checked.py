"""What backends check of their arguments, the compiled ones before other code reads them by address."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isotherm.kernels.cache_rows import fp8_row_bytes
from isotherm.kernels.formats.stored import StoredWeight
from isotherm.kernels.ops import Kernels, LinearWeight, Router


def check_weights(weights: Sequence[StoredWeight], bias: Tensor | None = None) -> tuple[int, int]:
    """(outputs of all, inputs of each) of weights that share an input. Raises ValueError."""
    if not weights:
        raise ValueError("at least one weight is needed")
    inputs = weights[0].shape[1]
    if any(w.shape[1] != inputs for w in weights):
        raise ValueError(
            f"weights that share an input have shapes {[w.shape for w in weights]}; all need {inputs} inputs"
        )
    outputs = sum(w.shape[0] for w in weights)
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; {outputs} outputs need ({outputs},)")
    return outputs, inputs


def check_expert(gate: StoredWeight, up: StoredWeight, down: StoredWeight, hidden: int, inner: int) -> None:
    for name, weight, shape in (("gate", gate, (inner, hidden)), ("up", up, (inner, hidden)),
                                ("down", down, (hidden, inner))):  # fmt: skip
        if weight.shape != shape:
            raise ValueError(f"expert {name} has shape {weight.shape}; this bank's slots take {shape}")


def check_mlp(gate_up: LinearWeight, down: LinearWeight) -> None:
    if gate_up.in_features != down.out_features:
        raise ValueError(f"mlp's gate_up takes rows of {gate_up.in_features}; down gives rows of {down.out_features}")


def check_router(router: Router) -> None:
    experts = len(router.weight)
    if router.weight.dim() != 2 or tuple(router.bias.shape) != (experts,):
        raise ValueError(
            f"a router's weight {tuple(router.weight.shape)} and bias {tuple(router.bias.shape)} must be [E, D] and [E]"
        )
    if experts % router.n_group or not 0 < router.top_k <= experts or not 0 < router.topk_group <= router.n_group:
        raise ValueError(
            f"{experts} experts don't divide as {router.n_group} groups, {router.topk_group} kept, top {router.top_k}"
        )


def cache_blocks(cache: Tensor, latent: int, rotary: int, dtype: torch.dtype) -> tuple[int, int]:
    """(blocks, block size) of a layer's cache, whose rows are in `dtype`, or in FP8. Raises ValueError."""
    fp8 = fp8_row_bytes(latent, rotary, dtype.itemsize)
    widths = {dtype: latent + rotary, torch.uint8: fp8}
    if cache.dim() != 3 or widths.get(cache.dtype) != cache.shape[2] or not cache.is_contiguous():
        raise ValueError(
            f"the cache is {cache.dtype} {tuple(cache.shape)}; contiguous [blocks, block size, width] is needed, "
            + " or ".join(f"{dtype} with width {width}" for dtype, width in widths.items())
        )
    return cache.shape[0], cache.shape[1]


class CheckedKernels(Kernels):
    """Checks that need to know `dtype`. Each raises ValueError."""

    def _rows(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        """x as rows in `dtype`, each contiguous; rows may lie apart."""
        if x.dim() != 2 or x.dtype != self.dtype or width not in (None, x.shape[1]):
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}; {self.dtype} [T, {'*' if width is None else width}] is needed"
            )
        return x if x.stride(1) == 1 else x.contiguous()

    def _heads(self, x: Tensor, name: str, heads: int | None = None, width: int | None = None) -> Tensor:
        """x [T, H, width] in `dtype`, each head's values contiguous."""
        fits = x.dim() == 3 and x.dtype == self.dtype and heads in (None, x.shape[1]) and width in (None, x.shape[2])
        if not fits:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}; {self.dtype} [T, {heads or 'H'}, {width or '*'}] is needed"
            )
        return x if x.stride(2) == 1 else x.contiguous()

    def _residual(self, residual_TD: Tensor, x_TD: Tensor) -> Tensor:
        """What x is added to in place."""
        if residual_TD.shape != x_TD.shape or residual_TD.dtype != self.dtype or not residual_TD.is_contiguous():
            raise ValueError(
                f"residual must be contiguous {self.dtype} {tuple(x_TD.shape)}, not {residual_TD.dtype} "
                f"{tuple(residual_TD.shape)}"
            )
        return residual_TD

    def _cache(self, cache: Tensor, latent: int, rotary: int) -> tuple[int, int]:
        """(blocks, block size) of a layer's cache."""
        return cache_blocks(cache, latent, rotary, self.dtype)
