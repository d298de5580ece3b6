"""The gate of a MoE layer as C++ is given it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from isotherm.kernels.checked import check_router
from isotherm.kernels.native.attention import plain
from isotherm.kernels.ops import Router

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class RouterFields(ctypes.Structure):
    """Router in api.h."""

    _fields_ = (
        *((name, _L) for name in ("hidden", "experts")),
        *((name, _P) for name in ("weight", "bias")),
        *((name, _I) for name in ("n_group", "topk_group", "top_k", "normalise", "narrow")),
        ("scaling", _F),
    )  # fmt: skip


def router_fields(router: Router) -> tuple[RouterFields, tuple[Tensor, Tensor]]:
    """With the tensors that it points to, which must outlive it. Raises ValueError."""
    check_router(router)
    experts, hidden = router.weight.shape
    narrow = router.weight.dtype == torch.bfloat16
    weight = plain(router.weight, torch.bfloat16 if narrow else torch.float32)
    bias = plain(router.bias, torch.float32)
    fields = RouterFields(
        hidden=hidden, experts=experts, weight=weight.data_ptr(), bias=bias.data_ptr(), n_group=router.n_group,
        topk_group=router.topk_group, top_k=router.top_k, normalise=router.normalise, narrow=narrow,
        scaling=router.scaling,
    )  # fmt: skip
    return fields, (weight, bias)
