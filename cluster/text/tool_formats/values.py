"""What a value is that a model wrote as bare text between tags: by the schema of its argument, a string or JSON."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from isotherm.cluster.jsontypes import JSON

_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_DEPTH = 8  # references and alternatives within each other, at most
# What is known of a schema so many references and alternatives deep; it stands beside, so that its id stays its own.
Known: TypeAlias = dict[tuple[int, int], tuple[Any, frozenset[str]]]


def argument(parameters: JSON, name: str) -> Any:
    """The schema of one argument; None where there is none."""
    properties = parameters.get("properties")
    found = properties.get(name) if isinstance(properties, dict) else None
    return parameters.get("additionalProperties") if found is None else found


def types(schema: Any, root: JSON, known: Known | None = None) -> frozenset[str]:
    """The JSON types that a value of this schema may have; none where the schema does not say. `known`: what was found
    of schemas of the same root before, and is added to."""
    return _types(schema, root, 0, {} if known is None else known)


def _types(schema: Any, root: JSON, depth: int, known: Known) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > _DEPTH:
        return frozenset()
    key = (id(schema), depth)
    if key not in known:
        known[key] = (schema, _types_of(schema, root, depth, known))
    return known[key][1]


def _types_of(schema: Mapping[str, Any], root: JSON, depth: int, known: Known) -> frozenset[str]:
    if isinstance(reference := schema.get("$ref"), str):
        return _types(_referred(reference, root), root, depth + 1, known)
    if isinstance(said := schema.get("type"), str):
        return frozenset({said})
    if isinstance(said, list):
        return frozenset(filter(lambda kind: isinstance(kind, str), said))
    if "const" in schema:
        return frozenset({type_of(schema["const"])})
    if isinstance(values := schema.get("enum"), list):
        return frozenset(map(type_of, values))
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(key), list):
            found = [_types(option, root, depth + 1, known) for option in options]
            if key != "allOf" and not all(found):
                return frozenset()  # one of them may be anything
            return frozenset().union(*found)
    return frozenset({"object"}) if "properties" in schema else frozenset()


def branches(schema: Any, root: JSON) -> list[Any]:
    """The schemas of one type each of which this one is the alternative, as far as it says so; each once, however often
    it is referred to."""
    found: dict[tuple[int, int], Any] = {}
    _find_branches(schema, root, 0, found, set())
    return list(found.values())


def _find_branches(
    schema: Any, root: JSON, depth: int, found: dict[tuple[int, int], Any], seen: set[tuple[int, int]]
) -> None:
    """Adds those of a schema, by where they come from: its identity, and their place in its list of types."""
    if (id(schema), depth) in seen:
        return
    seen.add((id(schema), depth))
    if not isinstance(schema, Mapping) or depth > _DEPTH:
        found.setdefault((id(schema), 0), schema)
        return
    if isinstance(reference := schema.get("$ref"), str) and len(schema) == 1:
        _find_branches(_referred(reference, root), root, depth + 1, found, seen)
        return
    if isinstance(said := schema.get("type"), list):
        for i, kind in enumerate(said):
            found.setdefault((id(schema), i), {**schema, "type": kind})
        return
    for key in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(key), list) and not set(schema) - {key, "title", "description", "default"}:
            for option in options:
                _find_branches(option, root, depth + 1, found, seen)
            return
    found.setdefault((id(schema), 0), schema)


def type_of(value: Any) -> str:
    return "null" if value is None else _NAMES[type(value)]


def as_json(raw: str, allowed: frozenset[str]) -> str:
    """The JSON text that `raw` stands for where values may have the types in `allowed`, any where it is empty. JSON of
    such a type stays as it is written; Python's way of writing one is understood; the rest is a string."""
    text = raw.strip()
    value = _parsed(text)
    if value is not _NONE and _fits(value, allowed):
        return text
    if allowed != {"string"}:
        value = _python(text)
        if value is not _NONE and _fits(value, allowed - {"string"}):
            return json.dumps(value, ensure_ascii=False)
    return json.dumps(raw, ensure_ascii=False)


_NONE = object()


def _fits(value: Any, allowed: frozenset[str]) -> bool:
    kind = "integer" if isinstance(value, float) and value.is_integer() else type_of(value)
    return not allowed or kind in allowed or (kind == "integer" and "number" in allowed)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NONE


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _python(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return _NONE
    return value if type(value) in _NAMES or value is None else _NONE


def _referred(reference: str, root: JSON) -> Any:
    at: Any = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        if step:
            at = at.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(at, dict) else None
    return at if reference.startswith("#") else None
