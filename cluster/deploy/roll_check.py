"""Whether another model can be rolled out: whether the front door could go on with it, and whether there is room for
its workers beside those that serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray

from isotherm.cluster.deploy.capacity import free_memory, least_weights
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.manifest import Manifest, human_bytes
from isotherm.cluster.messages.operations import OperationError
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.sameness import differences


@dataclass(frozen=True)
class Room:
    """What the workers need, in words; what there is too little of now; and whether that can be waited for."""

    words: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    hopeless: bool = False

    def __add__(self, other: Room) -> Room:
        return Room(self.words + other.words, self.lacks + other.lacks, self.hopeless or other.hopeless)

    def refuse(self) -> None:
        """Raises OperationError where nothing is to be had by waiting."""
        if self.hopeless:
            raise OperationError("; ".join(self.lacks), "model", conflict=True)


def open_checkpoint(manifest: Manifest, path: str | Path) -> Checkpoint:
    """As the manifest has it drafting. Raises ModelConfigError, CheckpointError."""
    return Checkpoint.open(Path(path)).drafting(manifest.speculation.kind)[0]


def check_successor(manifest: Manifest, serving: Checkpoint, path: Path) -> Checkpoint:
    """The checkpoint there, if it can take the place of the one that serves. Reads headers. Raises OperationError."""
    try:
        found = open_checkpoint(manifest, path)
        differing = differences(serving, found, defaults_matter=manifest.generation_config == "auto")
        same = not differing and found.digest() == serving.digest()
    except (IsothermError, OSError) as error:
        raise OperationError(f"model: {error}", "model") from None
    if differing:
        raise OperationError(
            f"model: {path} cannot take the place of {serving.path}, for it must have the same architecture and the "
            f"same tokenizer: {'; '.join(differing)}. End this cluster and serve it anew",
            "model",
        )
    if same:
        raise OperationError(f"model: {path} has the weights that are served already, from {serving.path}", "model")
    return found


def check_memory(manifest: Manifest, checkpoint: Checkpoint, shards: int) -> Room:
    """Of the machines' own memory. What is free is known where there is one machine."""
    weights = least_weights(manifest, checkpoint, shards)
    kv = 0 if manifest.attention.gpus else shards * manifest.engine.kv_memory
    free = free_memory() if sum(bool(node["Alive"]) for node in ray.nodes()) == 1 else None
    return memory_room(weights, kv, free)


def memory_room(weights: int, kv: int, free: int | None) -> Room:
    words = f"memory beside what serves: {human_bytes(weights)} of weights at the least, {human_bytes(kv)} of KV cache"
    if free is None:
        return Room([f"{words}; what the nodes have free is not known here"])
    words = f"{words}; {human_bytes(free)} is free"
    short = f"it does not fit: {words}. Begin with fewer shards (--attention-shards), or end something"
    return Room([words]) if weights + kv <= free else Room([words], [short], hopeless=True)


def room_for(workers: Sequence[Mapping[str, float]]) -> Room:
    """Of Ray's resources, which each worker reserves."""
    return resource_room(workers, ray.available_resources())


def resource_room(workers: Sequence[Mapping[str, float]], available: Mapping[str, float]) -> Room:
    needs: Counter[str] = Counter()  # it adds up floats as well
    for resources in workers:
        needs.update(resources)
    if not needs:
        return Room()
    words = ", ".join(
        f"{amount:g} {name} of which {available.get(name, 0.0):g} are free" for name, amount in sorted(needs.items())
    )
    short = any(amount > available.get(name, 0.0) + 1e-6 for name, amount in needs.items())
    lacks = [f"it does not fit now: {words}; it would wait for that until its deadline"] if short else []
    return Room([f"to reserve in Ray: {words}"], lacks)
