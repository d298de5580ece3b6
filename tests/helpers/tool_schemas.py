"""Random tools, of schemas that every format can enforce, for what has to hold for any of them."""

from __future__ import annotations

import random
from typing import Any

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.tool_formats.base import Tool

_WORDS = ["city", "days", "query", "limit", "unit", "filter", "path", "exact", "when", "tags", "größe", "a b"]


def random_tool(r: random.Random, name: str) -> Tool:
    properties = {key: _value(r, 0) for key in r.sample(_WORDS, r.randint(0, 4))}
    required = [key for key in properties if r.random() < 0.6]
    parameters: JSON = {"type": "object", "properties": properties, "required": required}
    if r.random() < 0.5:
        parameters["additionalProperties"] = False
    if r.random() < 0.3:
        parameters["$defs"] = {
            "size": {"enum": ["s", "m", "l"]},
            "point": {"type": "array", "items": {"type": "number"}},
        }
        properties["size"] = {"$ref": "#/$defs/size"}
        properties["points"] = {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2}
    return Tool(name, parameters, strict=True)


def random_tools(r: random.Random) -> list[Tool]:
    names = r.sample(["get_weather", "now", "search", "mcp.call-it", "f", "get_weather_2"], r.randint(1, 3))
    return [random_tool(r, name) for name in names]


def _value(r: random.Random, depth: int) -> Any:
    kinds = ["string", "enum", "const", "integer", "number", "boolean", "null", "optional", "maybe"]
    kind = r.choice(kinds + (["array", "object"] if depth < 2 else []))
    if kind == "enum":
        return {"type": "string", "enum": r.sample(["red", "green", "dark blue", "7", "true"], r.randint(1, 3))}
    if kind == "const":
        return {"const": r.choice(["one", 1, True, None])}
    if kind == "optional":
        return {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    if kind == "maybe":
        return {"type": ["integer", "null"]}
    if kind == "array":
        return {"type": "array", "items": _value(r, depth + 1), "maxItems": 3}
    if kind == "object":
        inner = {key: _value(r, depth + 1) for key in r.sample(_WORDS, r.randint(1, 2))}
        return {"type": "object", "properties": inner, "required": list(inner)[:1], "additionalProperties": False}
    if kind == "integer":
        return {"type": "integer", "minimum": 0, "maximum": r.choice([9, 1000])}
    return {"type": kind}
