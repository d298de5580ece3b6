"""Tools declared in TypeScript, as Kimi K2.5's chat template wants them in `tools_ts_str`.

    # Tools

    ## functions
    namespace functions {
    // What it does
    type get_weather = (_: {
      // Of which city
      city: string,
      days?: number
    }) => any;
    }

Its own tokenizer makes that text in code that comes with the checkpoint, which is never run here. What it writes for
each schema is said here anew; where it can write none, neither can this. Source: tool_declaration_ts.py of
moonshotai/Kimi-K2.5."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON

_INDENT = "  "
_UNION = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
_NUMBERS = ("maximum", "minimum")
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": _NUMBERS,
    "integer": _NUMBERS,
    "array": ("maxItems", "minItems"),
}  # in alphabetical order
_OF_TYPE: dict[str, tuple[type, ...]] = {
    "string": (str,), "number": (int, float), "integer": (int,), "boolean": (bool,)
}  # fmt: skip
_DEFINITIONS, _SELF, _ROOT = "#/$defs/", "#", "parameters"


class UndeclarableError(IsothermError, ValueError):
    """A schema that has no declaration."""


def sorted_keys(value: Any) -> Any:
    """A JSON value whose objects have their keys in order: so Kimi's tokenizers give tools to their templates."""
    if isinstance(value, Mapping):
        return {key: sorted_keys(value[key]) for key in sorted(value)}
    return [sorted_keys(item) for item in value] if isinstance(value, list) else value


def declared_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Raises UndeclarableError."""
    functions = [tool["function"] for tool in tools if tool.get("type") == "function" and tool.get("function")]
    if not functions:
        return ""
    try:
        declared = "\n".join(map(_function, functions))
    except RecursionError:
        raise UndeclarableError("a tool's schema is nested too deeply") from None
    return f"# Tools\n\n## functions\nnamespace functions {{\n{declared}\n}}\n"


def _function(function: JSON) -> str:
    parameters = function.get("parameters") or {}
    definitions: JSON = {}
    refers_to_itself = _SELF in set(_references_in_object(parameters, definitions))
    lines, argument = [], _object(parameters, "")
    if refers_to_itself:
        fields = ",\n".join(_fields(parameters, parameters.get("properties") or {}, _INDENT))
        body = f"\n{fields}\n" if fields else ""
        lines.append(f"interface {_ROOT} {{{body}}}")
        argument = _ROOT
    for name, schema in list(definitions.items()):
        set(_references(schema, definitions))
        comment = _commented(schema.get("description", ""), "") if isinstance(schema, Mapping) else ""
        lines.append(f"{comment}interface {name} {_type(schema, '')}")
    lines.append(_commented(function.get("description") or "", "").removesuffix("\n"))
    lines.append(f"type {function.get('name', 'function')} = (_: {argument}) => any;")
    return "\n".join(filter(None, lines))


def _references(schema: Any, definitions: JSON) -> Iterator[str]:
    """Every reference of a schema, which must be to itself or to a definition that was met before. Definitions are
    added where they are met."""
    if not isinstance(schema, Mapping):
        return
    if "$ref" in schema:
        reference = schema["$ref"]
        name = str(reference).removeprefix(_DEFINITIONS)
        if reference != _SELF and (name == reference or name not in definitions):
            raise UndeclarableError(f"$ref is {reference!r}; it must be # or one of $defs")
        yield reference
        return
    if "anyOf" in schema:
        for one in schema["anyOf"]:
            yield from _references(one, definitions)
    elif "enum" not in schema and schema.get("type") == "object":
        yield from _references_in_object(schema, definitions)
    elif "enum" not in schema and schema.get("type") == "array":
        yield from _references(schema.get("items"), definitions)


def _references_in_object(schema: JSON, definitions: JSON) -> Iterator[str]:
    definitions.update(schema.get("$defs") or {})
    for inner in (schema.get("additionalProperties"), *(schema.get("properties") or {}).values()):
        yield from _references(inner, definitions)


def _type(schema: Any, indent: str) -> str:
    """The type that a schema is. What it consists of over several lines is indented by `indent`."""
    if isinstance(schema, bool):
        return "any" if schema else "null"
    if not isinstance(schema, Mapping):
        raise UndeclarableError(f"a schema is {str(schema)[:80]!r}; it must be an object")
    if "$ref" in schema:
        return _ROOT if schema["$ref"] == _SELF else str(schema["$ref"]).removeprefix(_DEFINITIONS)
    if "anyOf" in schema:
        return " | ".join(_type(one, indent) for one in schema["anyOf"])
    if "enum" in schema:
        return _enumeration(schema)
    kind = schema.get("type")
    if isinstance(kind, list):
        if unknown := [one for one in kind if one not in _UNION]:
            raise UndeclarableError(f"type has {unknown[0]!r}; it must be of {', '.join(_UNION)}")
        return " | ".join(_UNION[one] for one in kind)
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return _array(schema, indent)
    if "type" not in schema and schema:
        raise UndeclarableError(f"a schema has neither type, enum, anyOf nor $ref: {str(schema)[:80]}")
    return "number" if kind == "integer" else str(schema.get("type", "any"))


def _enumeration(schema: JSON) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        if len(kind) > 2 or (len(kind) == 2 and "null" not in kind):
            raise UndeclarableError(f"an enum has the types {kind}; it must have one, and null perhaps")
        kind = next((one for one in kind if one != "null"), None)
    values = schema["enum"]
    if wrong := [one for one in values if one is not None and not isinstance(one, _OF_TYPE.get(kind or "", object))]:
        raise UndeclarableError(f"an enum has {wrong[0]!r}, which is no {kind}")
    return " | ".join(f'"{one}"' if isinstance(one, str) else str(one) for one in values)


def _object(schema: JSON, indent: str) -> str:
    properties, required = schema.get("properties") or {}, set(schema.get("required") or ())
    in_order = dict(sorted(properties.items(), key=lambda pair: (pair[0] not in required, pair[0])))
    fields = list(_fields(schema, in_order, indent + _INDENT))
    others = schema.get("additionalProperties")
    if others is not None:
        kind = "never" if others is False else "any" if others is True else _type(others, indent + _INDENT)
        fields.append(f"{indent}{_INDENT}[k: string]: {kind}")
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}" if fields else "{}"


def _fields(schema: JSON, properties: Mapping[str, Any], indent: str) -> Iterator[str]:
    required = set(schema.get("required") or ())
    for name, inner in properties.items():
        comments = _comments(inner, indent)
        default = inner.get("default") if isinstance(inner, Mapping) else None
        if default is not None:
            said = repr(default) if isinstance(default, int | float) else json.dumps(default, ensure_ascii=False)
            comments += f"{indent}// Default: {said}\n"
        yield f"{comments}{indent}{name}{'' if name in required else '?'}: {_type(inner, indent)}"


def _array(schema: JSON, indent: str) -> str:
    item = schema.get("items") or {}
    inner = indent + _INDENT
    if comments := _comments(item, inner):
        return f"Array<\n{comments}{inner}{_type(item, inner)}\n{indent}>"
    return f"Array<{_type(item, indent)}>"


def _comments(schema: Any, indent: str) -> str:
    """What is said above a field: its description, and what its values must keep to."""
    if not isinstance(schema, Mapping):
        return ""
    said = _commented(schema.get("description") or "", indent)
    kind = None if {"$ref", "anyOf", "enum"} & schema.keys() else schema.get("type")
    names = _CONSTRAINTS.get(kind, ()) if isinstance(kind, str) else ()
    if limits := ", ".join(f"{name}: {schema[name]}" for name in names if name in schema):
        said += f"{indent}// {limits}\n"
    return said


def _commented(text: str, indent: str) -> str:
    if not isinstance(text, str):
        raise UndeclarableError(f"a description is {str(text)[:80]!r}; it must be a text")
    return "".join(f"{indent}// {line}\n" if line else "\n" for line in text.split("\n")) if text else ""
