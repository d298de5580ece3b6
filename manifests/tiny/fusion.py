"""Functions of several element-wise operations that can be compiled into one pass over memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P, _T = ParamSpec("_P"), TypeVar("_T")


class Fusion:
    """Whether `fused` functions are compiled when they are first called, which takes a C++ compiler and a minute in
    all, or run operation by operation."""

    on = False


def fused(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """A function of tensors whose sizes may change from call to call."""
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return (compiled() if Fusion.on else function)(*args, **kwargs)

    return call
