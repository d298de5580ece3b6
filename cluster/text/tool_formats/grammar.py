"""The pieces of which the formats make llguidance Lark grammars of their calls: text with control tokens in it, lists
of calls, and arguments as one JSON object or as pairs of a key and a bare value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.grammar import json_schema, literal
from isotherm.cluster.text.json_schema import GrammarError
from isotherm.cluster.text.tool_formats.base import Tool
from isotherm.cluster.text.tool_formats.values import Known, branches, types

_NOTES = frozenset({"title", "description", "default", "examples", "example", "deprecated", "$comment"})
# What a schema of arguments may have beside its properties where these are written as pairs.
_OF_PAIRS = _NOTES | {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
    "$schema",
    "$id",
}
_OF_TEXT = _NOTES | {"type", "enum", "const"}  # what one of a string may have, where it is written as bare text
_OF_SCALAR = _NOTES | {"type"}
_SCALARS = frozenset({"null", "boolean", "integer", "number"})
_NO_STRING: JSON = {"type": ["null", "boolean", "number", "object", "array"]}
_NOTHING = '""'
_NOT_IN_KEYS = frozenset('"<>\n')
_ANY_KEY = '/[^"<>\\n]{1,64}/'


class ToolSchemaError(GrammarError):
    """A tool's schema cannot be enforced in the model's format. Says what stands in the way; `tool` is its name."""

    def __init__(self, tool: str, why: str) -> None:
        super().__init__(why)
        self.tool = tool


class Literals:
    """Text as it stands in a grammar, with those control tokens in it that the vocabulary has (text → id)."""

    def __init__(self, control_tokens: Mapping[str, int]) -> None:
        self._tokens = control_tokens

    def __call__(self, text: str) -> str:
        return literal(text, self._tokens) if text else ""

    def text_to(self, rule: str, end: str) -> str:
        """A rule for any text up to `end` and over it, which the text does not have in it."""
        at = min((end.index(token) for token in self._tokens if token in end), default=len(end))
        if at == len(end):
            return f"{rule}[suffix={literal(end, {})}]: /(?s:.*)/"
        # A control token is no part of any text. What stands before it is, and the text may have that elsewhere.
        before = re.escape(end[:at]).replace("/", "\\/")
        return f"{rule}: /(?s:.*){before}/ {self(end[at:])}"


def call_list(count: int, between: str, *, parallel: bool) -> str:
    """One of the rules call_0, call_1, …; where `parallel`, or several with `between` between them."""
    one = f"({' | '.join(f'call_{i}' for i in range(count))})"
    return f"{one} ({between} {one})*" if parallel else one


def object_rule(rule: str, tool: Tool) -> str:
    """A rule for a tool's arguments as a JSON object."""
    return f"{rule}: {_json(tool, _schema(tool))}"


def _json(tool: Tool, schema: JSON) -> str:
    """The right side of a rule for JSON by the schema."""
    try:
        grammar = json.loads(json_schema(schema))["grammars"][0]
    except GrammarError as error:
        raise ToolSchemaError(tool.name, str(error)) from None
    return f"%json {json.dumps(grammar['json_schema'], ensure_ascii=False)}"


def _schema(tool: Tool) -> JSON:
    """What arguments are held to: an object, without properties that the schema does not know."""
    closed: JSON = {"additionalProperties": False} if "properties" in tool.parameters else {}
    return {"type": "object", **closed, **tool.parameters}


class PairRules:
    """Makes the rules of arguments that are written as pairs. `begin` is what stands in the grammar before a value,
    from that of its key and whether the value is called a string; `end` the text that a value ends with, `gap` what
    stands between pairs; `typed`: the model says of each value whether it is a string."""

    def __init__(
        self, written: Literals, begin: Callable[[str, bool], str], end: str, gap: str, *, typed: bool
    ) -> None:
        self._written, self._begin, self._end, self._gap, self._typed = written, begin, end, gap, typed

    def __call__(self, rule: str, tool: Tool) -> list[str]:
        """The rules of a tool's arguments, of which `rule` is the first. Properties come in the schema's order. Raises
        ToolSchemaError."""
        schema = _schema(tool)
        if others := sorted(set(schema) - _OF_PAIRS):
            raise ToolSchemaError(tool.name, f"{others[0]!r} beside its properties cannot be enforced")
        properties = schema.get("properties") or {}
        required = set(schema.get("required") or ())
        if unknown := sorted(required - set(properties)):
            raise ToolSchemaError(tool.name, f"{unknown[0]!r} is required and no property of it")
        if not properties and schema.get("additionalProperties") is not False:
            texts = [self._written.text_to(f"{rule}_text", self._end)]
            ways = [f"{self._begin(_ANY_KEY, True)} {rule}_text"]
            if self._typed:
                ways.append(f"{self._begin(_ANY_KEY, False)} {rule}_json {self._written(self._end)}")
                texts.append(f"{rule}_json: {_json(tool, _NO_STRING)}")
            return [f"{rule}: (({' | '.join(ways)}) {self._gap})*", *texts]
        rules: list[str] = []
        pairs = []
        for i, (key, value) in enumerate(properties.items()):
            if set(key) & _NOT_IN_KEYS:
                raise ToolSchemaError(tool.name, f"the name {key!r} cannot stand in a tag")
            name = f"{rule}_{i}"
            rules += self._pair(name, tool, schema, key, value)
            pairs.append(name if key in required else f"{name}?")
        return [f"{rule}: {' '.join(pairs) or _NOTHING}", *rules]

    def _pair(self, rule: str, tool: Tool, root: JSON, key: str, schema: Any) -> list[str]:
        texts: list[JSON] = []
        others: list[Any] = []
        known: Known = {}
        for branch in branches(schema, root):
            (texts if types(branch, root, known) == {"string"} else others).append(branch)
        if texts and others and not self._typed:
            self._check_apart(tool, key, others)
        written = json.dumps(key, ensure_ascii=False)
        rules, ways = [], []
        for i, branch in enumerate(texts):
            if unknown := sorted(set(branch) - _OF_TEXT):
                raise ToolSchemaError(tool.name, f"{unknown[0]!r} of its string {key!r} cannot be enforced")
            ways.append(f"{self._begin(written, True)} {rule}_text{i}")
            values = [branch["const"]] if "const" in branch else branch.get("enum")
            if values is None:
                rules.append(self._written.text_to(f"{rule}_text{i}", self._end))
            else:
                options = " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
                rules.append(f"{rule}_text{i}: ({options}) {self._written(self._end)}")
        if others:
            ways.append(f"{self._begin(written, False)} {rule}_json {self._written(self._end)}")
            rules.append(f"{rule}_json: {_json(tool, self._values(tool, root, key, others, known))}")
        return [f"{rule}: ({' | '.join(ways)}) {self._gap}", *rules]

    def _values(self, tool: Tool, root: JSON, key: str, schemas: list[Any], known: Known) -> JSON:
        """One schema of values that are no strings."""
        if reference := re.search(r'"\$ref": "(?!#/(?:\$defs|definitions)/)([^"]*)"', json.dumps(schemas)):
            raise ToolSchemaError(tool.name, f"the reference {reference[1]!r} in {key!r} cannot be followed")
        definitions: JSON = {name: root[name] for name in ("$defs", "definitions") if name in root}
        plain = [
            schema if isinstance(schema, dict) and types(schema, root, known) else _NO_STRING for schema in schemas
        ]
        return {**(plain[0] if len(plain) == 1 else {"anyOf": plain}), **definitions}

    def _check_apart(self, tool: Tool, key: str, others: list[Any]) -> None:
        """Bare text that may be a string or something else is that where it can be: it must then fit in any case."""
        for branch in others:
            if not (isinstance(branch, dict) and types(branch, {}) <= _SCALARS and set(branch) <= _OF_SCALAR):
                raise ToolSchemaError(
                    tool.name, f"{key!r} may be a string or something else, which bare text does not tell apart"
                )
