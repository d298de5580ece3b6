"""The error of kernels that cannot be had."""

from __future__ import annotations


class KernelsUnavailable(RuntimeError):
    """The backend that was asked for is not one for this device, or cannot be loaded; the message says what to do."""


class UnknownKernels(KernelsUnavailable, ValueError):
    """No backend, or no instruction set, has this name; the message has those that there are."""
