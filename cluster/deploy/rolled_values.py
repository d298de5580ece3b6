"""Which values of a manifest can change under a cluster that serves, and by which command. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from pydantic import BaseModel

from isotherm.cluster.manifest import Manifest, parse_manifest


class By(Enum):
    """What changes a value."""

    WORKERS = "isotherm roll --manifest FILE"
    FRONT_DOOR = "isotherm roll --ingress FILE"
    SCALE = "isotherm scale"
    MODEL = "isotherm roll MODEL"
    NOTHING = "nothing, as long as it serves"


_LISTENS = "Serve listens there from the cluster's start to its end"
_ONCE = "the controller takes it when the cluster is started"
# Every field of the manifest, or a section as a whole; where both stand here the field's own line counts.
RULES: Mapping[str, By] = {
    "model": By.MODEL,
    "served_name": By.FRONT_DOOR,
    "device": By.WORKERS,
    "dtype": By.WORKERS,
    "weights": By.WORKERS,
    "kernels": By.WORKERS,
    "isa": By.WORKERS,
    "mixed": By.WORKERS,
    "generation_config": By.FRONT_DOOR,
    "logprobs": By.FRONT_DOOR,
    "tool_format": By.FRONT_DOOR,
    "control_tokens": By.FRONT_DOOR,
    "attention": By.WORKERS,
    "attention.shards": By.SCALE,
    "experts": By.WORKERS,
    "experts.groups": By.SCALE,
    "engine": By.WORKERS,
    "engine.shared_prefix_cache": By.FRONT_DOOR,
    "speculation": By.WORKERS,
    "links": By.WORKERS,
    "liveness": By.WORKERS,
    "autoscaling": By.NOTHING,
    "http": By.FRONT_DOOR,
    "http.host": By.NOTHING,
    "http.port": By.NOTHING,
    "http.tls": By.NOTHING,
    "http.keys": By.NOTHING,
    "logging": By.WORKERS,
    "tracing": By.NOTHING,
}
WHY: Mapping[str, str] = {
    "autoscaling": "the autoscaler knows past loads by these values; POST /admin/autoscaler changes its mode",
    "http.host": _LISTENS,
    "http.port": _LISTENS,
    "http.tls": _LISTENS,
    "http.keys": "who is asked for a key is settled when the cluster is started; the file itself is read anew",
    "tracing": _ONCE,
}


@dataclass(frozen=True)
class Change:
    """One value that two manifests have differently."""

    field: str  # with its section's: "engine.kv_memory"
    before: Any  # as JSON
    after: Any

    @property
    def by(self) -> By:
        return RULES[_rule(self.field)]

    def __str__(self) -> str:
        return f"{self.field}: {json.dumps(self.before)} → {json.dumps(self.after)}"

    @property
    def otherwise(self) -> str:
        """Of one that does not concern workers: how it is changed, or why it cannot be."""
        if self.by is By.NOTHING:
            return f"{self} (cannot be rolled: {WHY[_rule(self.field)]})"
        return f"{self} (by {self.by.value})"


def changes(before: Manifest, after: Manifest) -> list[Change]:
    """In the order of the manifest's fields."""
    has, wants = _values(before), _values(after)
    return [Change(field, has[field], value) for field, value in wants.items() if has[field] != value]


def as_operated(manifest: Manifest, shards: int, groups: int, model: str | None) -> Manifest:
    """With the numbers of workers and the model that operations have come to; `model`: None for the manifest's own."""
    sections = {
        "attention": manifest.attention.model_copy(update={"shards": shards}),
        "experts": manifest.experts.model_copy(update={"groups": groups}),
    }
    return manifest.model_copy(update=sections if model is None else sections | {"model": model})


def still_differing(running: Manifest, now: Manifest, wanted: Manifest) -> list[Change]:
    """What a manifest has neither as the cluster was started with it (`running`) nor as operations have made that
    (`now`): a file that was true at the start is not at fault for a scale since then."""
    found = {change.field for change in changes(now, wanted)}
    return [change for change in changes(running, wanted) if change.field in found]


def with_workers_of(front: Manifest, workers: Manifest) -> Manifest:
    """`front` with every value of `workers` that concerns those: what a cluster has whose front door has the one and
    whose workers the other."""
    data = front.model_dump(mode="json")
    for field, value in _values(workers).items():
        if RULES[_rule(field)] is By.WORKERS:
            *sections, name = field.split(".")
            place = data
            for section in sections:
                place = place[section]
            place[name] = value
    return parse_manifest(data)


def _values(manifest: Manifest) -> dict[str, Any]:
    return dict(_fields(manifest, manifest.model_dump(mode="json"), ""))


def _fields(section: BaseModel, data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel) and f"{prefix}{name}" not in WHOLE:
            yield from _fields(value, data[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", data[name]


WHOLE = ("http.tls",)  # a section that may be absent: one value


@cache
def _rule(field: str) -> str:
    """The line of RULES for a field: its own, or that of the nearest section around it."""
    while field and field not in RULES:
        field, _, _ = field.rpartition(".")
    return field  # that every field has one is what the test of this module looks at
