"""Which kind of link joins a shard and an expert group: one table, of which the manifest's `links.kind` has its values
too. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.messages.workers import Locality

AUTO = "auto"


class LinkChoiceError(IsothermError, ValueError):
    """The manifest asks for a kind of link that these two workers cannot have."""


@dataclass(frozen=True)
class LinkRule:
    """Whether a shard and a group, in this order, can be joined by one kind of link."""

    kind: str  # of actors/links/registry.py
    asked_for_as: str  # by `links.kind` in the manifest
    because: str  # it is taken, where it is: both workers can have it
    against: Callable[[Locality, Locality], str | None]  # why they cannot have it

    def refusal(self, shard: Locality, group: Locality) -> str | None:
        """Why these two cannot have it, by the rule or by what either says of itself."""
        for who, where in (("shard", shard), ("group", group)):
            if (reason := where.unable.get(self.kind)) is not None:
                return f"the {who} cannot have it: {reason}"
        return self.against(shard, group)


def _rows_elsewhere(shard: Locality, group: Locality, device: str) -> str | None:
    for who, where in (("shard", shard), ("group", group)):
        if where.device != device:
            return f"the {who}'s rows are on {where.device}"
    return None


def _against_shared_memory(shard: Locality, group: Locality) -> str | None:
    if (elsewhere := _rows_elsewhere(shard, group, "cpu")) is not None:
        return elsewhere
    if shard.machine != group.machine:
        return "the workers are on different hosts (or network namespaces, or users)"
    return None


def _against_nccl(shard: Locality, group: Locality) -> str | None:
    if (elsewhere := _rows_elsewhere(shard, group, "cuda")) is not None:
        return elsewhere
    return "both workers share one GPU, which NCCL does not allow" if shard.gpu == group.gpu else None


def _against_nothing(shard: Locality, group: Locality) -> str | None:
    return None


# The first that two workers can have is taken.
RULES = (
    LinkRule("shared-memory", "shared-memory", "both workers are on one host", _against_shared_memory),
    LinkRule("process-group-nccl", "process-group", "each worker computes on a GPU of its own", _against_nccl),
    LinkRule("process-group", "process-group", "any two workers can have it", _against_nothing),
)
# Kinds whose ends find each other by the meeting's prefix alone, without the cluster's key-value store.
WITHOUT_STORE = frozenset({"shared-memory"})


def choices() -> tuple[str, ...]:
    """What `links.kind` in the manifest may be."""
    return (AUTO, *dict.fromkeys(rule.asked_for_as for rule in RULES))


def choose_link(wanted: str, shard: Locality, group: Locality) -> tuple[str, str]:
    """The kind, and the reason in words: why this one, and why none of those before it. `wanted` is one of `choices()`.
    Raises LinkChoiceError where these two cannot have what is wanted."""
    refused: list[str] = []
    for rule in RULES:
        if wanted not in (AUTO, rule.asked_for_as):
            continue
        refusal = rule.refusal(shard, group)
        if refusal is None:
            because = rule.because if wanted == AUTO else "the manifest says so"
            return rule.kind, "; ".join([because, *refused])
        refused.append(f"no {rule.kind}, since {refusal}")
    hint = "" if wanted == AUTO else f'; "{AUTO}" takes another kind there'
    raise LinkChoiceError(f'links.kind is "{wanted}", but there can be {"; ".join(refused)}{hint}')
