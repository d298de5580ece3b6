"""What kernels/native/csrc/moe.cpp is told of a layer, checked once."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from isotherm.kernels.expert_bank import ExpertBank
from isotherm.kernels.native.router import RouterFields, router_fields
from isotherm.kernels.native.weights import NativeExpertBank
from isotherm.kernels.ops import LinearWeight, Router

_P = ctypes.c_void_p


class _MoeLayer(ctypes.Structure):
    """MoeLayer in api.h."""

    _fields_ = (("router", RouterFields), *((name, _P) for name in ("bank", "slot_of", "gate_up", "down")))


@dataclass(frozen=True, eq=False)
class BoundMoe:
    """A layer with every expert in one bank, as C++ is given it, and what it was made of."""

    structure: _MoeLayer
    bank: NativeExpertBank
    gate_up: LinearWeight | None
    down: LinearWeight | None
    keep: tuple[Tensor, ...]  # the slots first

    @property
    def hidden(self) -> int:
        return self.bank.hidden

    def fits(
        self, bank: ExpertBank | None, slot_of_E: Tensor | None, gate_up: LinearWeight | None, down: LinearWeight | None
    ) -> bool:
        """Whether it stands for these. Where experts are is read anew at each call, if C++ can read it in place."""
        return (
            slot_of_E is not None
            and self.keep[0].data_ptr() == slot_of_E.data_ptr()
            and _readable(slot_of_E)
            and len(self.keep[0]) == len(slot_of_E)
            and self.bank is bank
            and self.gate_up is gate_up
            and self.down is down
        )


def bind_moe(
    router: Router, bank: ExpertBank, slot_of_E: Tensor, gate_up: LinearWeight | None, down: LinearWeight | None
) -> BoundMoe:
    """Check that they fit each other, and point to them. The shared experts' shapes are checked elsewhere. Raises
    ValueError, TypeError."""
    if not isinstance(bank, NativeExpertBank):
        raise TypeError(f"native experts need a bank made by these kernels, not a {type(bank).__name__}")
    fields, tensors = router_fields(router)
    experts, hidden = router.weight.shape
    if hidden != bank.hidden or len(slot_of_E) != experts or (gate_up is None) != (down is None):
        raise ValueError(
            f"moe has a router {tuple(router.weight.shape)}, {len(slot_of_E)} slots and experts of {bank.hidden}"
        )
    if gate_up is not None and down is not None and (gate_up.in_features, down.out_features) != (hidden, hidden):
        raise ValueError(f"moe's shared experts go from {gate_up.in_features} to {down.out_features}, not {hidden}")
    slots = slot_of_E if _readable(slot_of_E) else slot_of_E.to(torch.int32).contiguous()
    structure = _MoeLayer(
        router=fields, bank=bank.handle, slot_of=slots.data_ptr(),
        gate_up=None if gate_up is None else gate_up.data.handle, down=None if down is None else down.data.handle,
    )  # fmt: skip
    return BoundMoe(structure, bank, gate_up, down, (slots, *tensors))


def _readable(slot_of_E: Tensor) -> bool:
    return slot_of_E.dtype == torch.int32 and slot_of_E.is_contiguous()
