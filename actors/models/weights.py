"""Reads tensors of a checked checkpoint from their mapped files, each worker only its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.fingerprint import Fingerprint
from isotherm.cluster.model.tensors import mlp_projections
from isotherm.kernels.formats.registry import stored_weight
from isotherm.kernels.formats.stored import StoredWeight
from isotherm.kernels.ops import Kernels

MAPPED_BYTES = 256 << 20  # read, before the files are mapped anew


class WeightReader:
    """Use as a context manager. Tensors are views of mapped files, so pack or copy them inside. What was read counts as
    this process's memory while the mapping lasts: so files are closed after every MAPPED_BYTES, and a mapping goes with
    the last view of it."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self._open: dict[Path, Any] = {}  # safetensors' readers have no types
        self._mapped = 0

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()
        self._mapped = 0

    def tensor(self, name: str) -> Tensor:
        info = self.checkpoint.tensors[name]
        if self._mapped > MAPPED_BYTES:
            self._close()
        handle = self._open.get(info.file)
        if handle is None:
            handle = self._open[info.file] = safe_open(info.file, framework="pt", device="cpu").__enter__()
        self.bytes_read += info.nbytes
        self._mapped += info.nbytes
        tensor: Tensor = handle.get_tensor(name)
        return tensor

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        infos = self.checkpoint.tensors[one], self.checkpoint.tensors[other]
        if infos[0].dtype != infos[1].dtype or infos[0].shape != infos[1].shape:
            return False
        return torch.equal(*(self.tensor(name).view(torch.uint8) for name in (one, other)))

    def stored(self, name: str) -> StoredWeight:
        """A projection as it is stored, in whatever format."""
        stored_as = self.checkpoint.format_of(name)
        names = {role: stored_as.tensor_name(name, role) for role in stored_as.leaves}
        tensors = {role: self.tensor(leaf) for role, leaf in names.items() if leaf in self.checkpoint.tensors}
        return stored_weight(stored_as.name, tensors, stored_as.parameters)

    def mlp(self, prefix: str) -> tuple[StoredWeight, StoredWeight, StoredWeight]:
        """gate, up and down projections."""
        gate, up, down = map(self.stored, mlp_projections(prefix))
        return gate, up, down

    def expert(self, layer: int, expert: int) -> tuple[StoredWeight, StoredWeight, StoredWeight]:
        gate, up, down = map(self.stored, self.checkpoint.config.expert_projections(layer, expert))
        return gate, up, down


def own_fingerprint(checkpoint: Checkpoint, kernels: Kernels, head: str) -> Fingerprint:
    """What decides the bits that this process computes. Reads a sample of the weights: tenths of a second, for a large
    checkpoint seconds."""
    return Fingerprint(
        weights=checkpoint.digest(),
        dtype=str(kernels.dtype).removeprefix("torch."),
        head=head,
        device=kernels.device.type,
        kernels=kernels.name,
        summation=kernels.summation,
        instructions=kernels.instructions,
    )


def parse_dtype(name: str) -> torch.dtype:
    """Activation dtype of a manifest or flag."""
    try:
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    except KeyError:
        raise ValueError(f'dtype is "{name}"; it must be "bfloat16" or "float32"') from None
