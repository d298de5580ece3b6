"""Whether another model, or other values of workers, can be rolled out: whether the front door could go on with it, and
whether there is room for its workers beside those that serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from isotherm.cluster.deploy.capacity import TOLERANCE, least_memory
from isotherm.cluster.deploy.preflight import check_devices
from isotherm.cluster.deploy.rolled_values import By, Change, changes, with_workers_of
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.machine_memory import free_memory
from isotherm.cluster.manifest import Manifest, ManifestError, human_bytes, parse_manifest
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


@dataclass(frozen=True)
class Values:
    """What a manifest that is to be rolled out comes to."""

    manifest: Manifest  # what the cluster has, with what the new one says of workers
    rolled: list[Change] = field(default_factory=list)
    left: list[Change] = field(default_factory=list)  # what it has besides, which stays

    def words(self) -> list[str]:
        return [f"change {change}" for change in self.rolled] + [f"leave {change.otherwise}" for change in self.left]


def wanted_values(
    running: Manifest, given: Mapping[str, Any] | None, other_model: bool, now: Manifest | None = None
) -> Values:
    """`given`: a manifest as its file says, or none; `other_model`: another one is asked for by itself, so that what
    the manifest calls it does not count. `now`: `running` as operations have made it, which words compare with. Raises
    OperationError."""
    if given is None:
        return Values(running)
    try:
        wanted = parse_manifest(given)
        found = changes(now or running, wanted)
        manifest = with_workers_of(running, wanted)
        check_devices(manifest)
    except ManifestError as error:
        raise OperationError(str(error), "manifest") from None
    left = [c for c in found if c.by is not By.WORKERS and not (other_model and c.by is By.MODEL)]
    values = Values(manifest, [c for c in found if c.by is By.WORKERS], left)
    if not values.rolled and not other_model:
        words = ["manifest: it has the values that the workers have already", *values.words()]
        raise OperationError("; ".join(words), "manifest")
    return values


def open_checkpoint(manifest: Manifest, path: str | Path) -> Checkpoint:
    """As the manifest has it drafting. Raises ModelConfigError, CheckpointError."""
    return Checkpoint.open(Path(path)).drafting(manifest.speculation.kind)[0]


def check_successor(values: Values, serving: Checkpoint, path: Path) -> Checkpoint:
    """The checkpoint there, if it can take the place of the one that serves, or be it with other values. Reads headers.
    Raises OperationError."""
    manifest, field = values.manifest, "manifest" if path == serving.path else "model"
    try:
        found = open_checkpoint(manifest, path)
        _check_drafting(serving, found)
        manifest.scheduler_config(found.config)
        differing = differences(serving, found, defaults_matter=manifest.generation_config == "auto")
        same = not values.rolled and not differing and found.digest() == serving.digest()
    except ManifestError as error:
        raise OperationError(f"manifest: {error}", "manifest") from None
    except OperationError:
        raise
    except (IsothermError, OSError) as error:
        raise OperationError(f"{field}: {error}", field) from None
    if differing:
        raise OperationError(
            f"{field}: {path} cannot take the place of {serving.path}, for it must have the same architecture and the "
            f"same tokenizer: {'; '.join(differing)}. End this cluster and serve it anew",
            field,
        )
    if same:
        raise OperationError(f"model: {path} has the weights that are served already, from {serving.path}", "model")
    return found


def _check_drafting(serving: Checkpoint, found: Checkpoint) -> None:
    """A layer that drafts has experts of its own, and a placement is one of as many layers as it was made for."""
    now, then = serving.config.drafting_layers, found.config.drafting_layers
    if serving.path == found.path and now != then:
        raise OperationError(
            f"manifest: speculation.kind: it would {'end' if now else 'begin'} the use of the model's "
            "multi-token-prediction layer, whose experts are part of the placement: that cannot be rolled, as "
            "speculation.tokens can, and ngram or off in the place of each other. End this cluster and serve it anew",
            "manifest",
        )


def check_memory(manifest: Manifest, checkpoint: Checkpoint, shards: int) -> Room:
    """Of the machines' own memory. What is free is known where there is one machine."""
    weights, kv = least_memory(manifest, checkpoint, shards)
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
    short = any(amount > available.get(name, 0.0) + TOLERANCE for name, amount in needs.items())
    lacks = [f"it does not fit now: {words}; it would wait for that until its deadline"] if short else []
    return Room([f"to reserve in Ray: {words}"], lacks)
