"""Whether a manifest's workers fit on the machine where a local Ray is to run them. On a Ray that others have started,
and that may grow, workers wait for their places instead. Imports no Ray."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from isotherm.cluster.manifest import Manifest, ManifestError, human_bytes
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.formats.registry import PLAIN
from isotherm.cluster.model.tensors import Part
from isotherm.cluster.model.weight_choice import LEAST_BYTES

TOLERANCE = 1e-6  # of sums of fractions


def check_machine(manifest: Manifest, path: Path, memory: int, cpus: int) -> None:
    """Before anything is started: whether this machine, with so many bytes of memory and so many CPUs, could hold the
    workers. Raises ManifestError, CheckpointError."""
    _check_memory(manifest, Checkpoint.open(path).drafting(manifest.speculation.kind)[0], memory)
    _check_total(manifest, "cpus", cpus)


def check_resources(manifest: Manifest, total: Mapping[str, float], labels: Sequence[Mapping[str, str]]) -> None:
    """Once Ray is there: whether its resources, as it names and counts them, and the labels of its nodes, can ever
    place the workers. Raises ManifestError."""
    for field, resource in (("cpus", "CPU"), ("gpus", "GPU"), ("memory", "memory")):
        _check_total(manifest, field, total.get(resource, 0.0))
    for section, wanted in (("attention", manifest.attention.labels), ("experts", manifest.experts.labels)):
        for name, selector in wanted.items():
            if not any(selects(selector, node.get(name)) for node in labels):
                raise ManifestError(
                    f'{section}.labels has {name}: "{selector}", and no node of a Ray that is started here has such a '
                    "label; leave it out, or start Ray with labels yourself and give --address"
                )


def _check_total(manifest: Manifest, field: str, there: float) -> None:
    a, e = manifest.attention, manifest.experts
    shard, group = getattr(a, field), getattr(e, field)
    needed = shard * a.shards + group * e.groups
    if needed <= there + TOLERANCE:
        return

    def shown(amount: float) -> str:
        return human_bytes(int(amount)) if field == "memory" else f"{amount:g}"

    has = {"cpus": "CPUs", "gpus": "GPUs", "memory": "of memory to reserve"}[field]
    raise ManifestError(
        f"attention.{field} is {shown(shard)} for each of {a.shards} shard(s), experts.{field} {shown(group)} for each "
        f"of {e.groups} group(s): that is {shown(needed)} in all, and a Ray on this machine has {shown(there)} {has}; "
        "reserve less, or give the --address of a larger cluster"
    )


def selects(selector: str, value: str | None) -> bool:
    """Ray's label selectors: value, !value, in(a,b), !in(a,b). A node without the label has none of the values."""
    negated, words = selector.startswith("!"), selector.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", words)
    allowed = [word.strip() for word in listed[1].split(",")] if listed else [words]
    return (value in allowed) != negated


def _check_memory(manifest: Manifest, checkpoint: Checkpoint, memory: int) -> None:
    """Refuses what is sure not to fit. The memory of GPUs is not looked at."""
    weights, kv = least_memory(manifest, checkpoint, manifest.attention.shards)
    if weights + kv <= memory:
        return
    each, shards = manifest.engine.kv_memory, manifest.attention.shards
    raise ManifestError(
        f"engine.kv_memory is {human_bytes(each)} for each of {shards} attention shard(s); with the weights, "
        f"{human_bytes(weights)} at the least, that is {human_bytes(weights + kv)}, and this machine has "
        f"{human_bytes(memory)} of memory; "
        + ("give less to engine.kv_memory" if weights < memory else "give the --address of a larger cluster")
    )


def least_memory(manifest: Manifest, checkpoint: Checkpoint, shards: int) -> tuple[int, int]:
    """Bytes of the machines' own memory for the weights, at the least, and for the KV cache of so many shards."""
    kv = 0 if manifest.attention.gpus else shards * manifest.engine.kv_memory
    return least_weights(manifest, checkpoint, shards), kv


def least_weights(manifest: Manifest, checkpoint: Checkpoint, shards: int) -> int:
    """Bytes of the machines' own memory that the weights of so many shards, and of one copy of each expert, take at the
    least."""
    shard = experts = 0
    for spec in checkpoint.config.loaded_tensors():
        stored_as = checkpoint.format_of(spec.name) if spec.quantisable else PLAIN
        form = manifest.weights.choice.form(spec)
        least = int(math.prod(spec.shape) * min(stored_as.least_bytes, LEAST_BYTES.get(form, stored_as.least_bytes)))
        shard, experts = (shard, experts + least) if spec.part is Part.ROUTED_EXPERTS else (shard + least, experts)
    return (0 if manifest.attention.gpus else shards * shard) + (0 if manifest.experts.gpus else experts)
