"""Kernels of a GPU, as tests use those of a CPU: given and giving tensors on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import Tensor

from isotherm.kernels.ops import Router

# What the engine too keeps on the host, where these are checked.
STAYS = {"experts": 3}  # the last of its arguments: rows, slots and offsets
WRITTEN = {"add_rms_norm": 1, "write_cache": 2}  # the argument that an operation writes to


class FromHost:
    """Every operation of `kernels`, whose tensors are carried to its device, and back what comes out or was written
    to."""

    def __init__(self, kernels: Any):
        object.__setattr__(self, "kernels", kernels)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.kernels, name)
        if not callable(found) or name.startswith(("pack_", "expert_bank", "describe")):
            return found
        return self._carrying(name, found)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.kernels, name, value)

    def _carrying(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        device, last, written = self.kernels.device, STAYS.get(name, 0), WRITTEN.get(name)

        def there(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device)
            if isinstance(value, Router):
                return replace(value, weight=there(value.weight), bias=there(value.bias))
            return value

        @wraps(operation)
        def carrying(*arguments: Any) -> Any:
            moved = len(arguments) - last
            carried = [there(a) for a in arguments[:moved]]
            result = operation(*carried, *arguments[moved:])
            if written is not None:
                arguments[written].copy_(carried[written])
            if isinstance(result, tuple):
                return tuple(r.cpu() for r in result)
            return result.cpu() if isinstance(result, Tensor) else result

        return carrying
