"""Which kind of link joins a shard and an expert group. Pure."""

from __future__ import annotations

from typing import Literal

from isotherm.cluster.messages.workers import LinkKind, Locality


class LinkChoiceError(ValueError):
    """The manifest asks for a kind of link that these two workers cannot have."""


def choose_link(
    wanted: Literal["auto", "process-group", "shared-memory"], shard: Locality, group: Locality
) -> tuple[LinkKind, str]:
    """The kind, and the reason in words. Between two GPUs rows go over NCCL beside the process group of the host.
    Raises LinkChoiceError where shared memory is asked for and cannot be had."""
    against = "the manifest says so" if wanted == "process-group" else _against_shared_memory(shard, group)
    if against is None:
        return "shared-memory", "both workers are on one host" if wanted == "auto" else "the manifest says so"
    if wanted == "shared-memory":
        raise LinkChoiceError(f'links.kind is "shared-memory", but {against}; "auto" takes process groups there')
    if shard.device == group.device == "cuda":
        if shard.gpu != group.gpu:
            return "process-group-nccl", "each worker computes on a GPU of its own"
        against = "both workers share one GPU, which NCCL does not allow"
    return "process-group", against


def _against_shared_memory(shard: Locality, group: Locality) -> str | None:
    for who, where in (("shard", shard), ("group", group)):
        if where.device != "cpu":
            return f"the {who}'s rows are on {where.device}"
        if where.unable is not None:
            return f"the {who} cannot have it: {where.unable}"
    return (
        None
        if shard.machine == group.machine
        else "the workers are on different hosts (or network namespaces, or users)"
    )
