"""Which weights a quantization_config leaves out: modules by name, or by a regular expression after `re:`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isotherm.cluster.model.config import Fields


def matches(entry: str, weight: str) -> bool:
    """Whether an entry names the module of `weight`."""
    module = weight.rpartition(".")[0]
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return entry in (module, module.rpartition(".")[2])


def ignored(q: Fields, name: str) -> tuple[str, ...]:
    """The list of this name, checked. Raises ModelConfigError."""
    entries = q.raw.get(name) or []
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise q.fail(name, entries, "a list of names, or of regular expressions after re:")
    for entry in entries:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise q.fail(name, entry, f"a regular expression after re: ({error})") from None
    return tuple(entries)
