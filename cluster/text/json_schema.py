"""A JSON schema as llguidance takes it, to the same meaning: without what says nothing about validity, and with a
`oneOf` of which no two can hold made an `anyOf`. What it cannot enforce is refused by name.

Knows nothing about grammars."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON

MOST_NESTED, MOST_SCHEMAS = 64, 2500  # schemas in one, a property's among them: about a second of compiling
MOST_STEPS = 100_000  # of multipleOf: that takes a good part of a second
# Keywords of JSON Schema (2020-12 and before) that say what is valid, and that nobody here enforces.
UNSUPPORTED = frozenset(
    {
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "propertyNames",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "unevaluatedItems",
        "unevaluatedProperties",
        "$dynamicRef",
        "$recursiveRef",
        "x-guidance",  # llguidance's own options
    }
)
_ONE = ("items", "additionalItems", "additionalProperties")
_SEVERAL = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_OTHERS = (
    "$ref",
    "const",
    "enum",
    "type",
    "minItems",
    "maxItems",
    "required",
    "minProperties",
    "maxProperties",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "$schema",
    "$id",
    "id",
    "$anchor",
)
_NAMES = ("$id", "id", "$schema")
_REFERENCE = re.compile(r"[\w.~:/?#\[\]@!$&'()*+,;=%-]+", re.ASCII)  # of a URI, as RFC 3986 has its characters
_KNOWN = frozenset((*_ONE, *_SEVERAL, *_NAMED, *_OTHERS))


# Those that llguidance enforces; another one is refused where no pattern stands beside it.
FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
_KNOWN_FORMATS = FORMATS - {"unknown"}
_LOOKS = re.compile(r"\(\?<?[=!]")  # what no regular language has


class GrammarError(IsothermError, ValueError):
    """What the output is to be cannot be had; the message says why, in one line."""


class SlowGrammarError(GrammarError):
    """Compiling it takes too long, here and now: another time, or elsewhere, it may not."""


def plain_schema(schema: JSON) -> JSON:
    """The schema as llguidance takes it. Raises GrammarError, which names the keyword that is not supported, and where
    it stands."""
    plain: JSON = _Plain(schema).of(schema, "", 0)
    return plain


class _Plain:
    def __init__(self, root: JSON):
        self._root = root
        self._seen = 0
        self._steps: list[Decimal] = []  # every multipleOf so far

    def of(self, schema: Any, path: str, depth: int) -> Any:
        """The schema at `path`. What is no schema at all is left to llguidance to refuse."""
        if not isinstance(schema, dict):
            return schema
        if depth > MOST_NESTED:
            raise GrammarError(f"the schema is nested deeper than {MOST_NESTED}")
        self._check_free_keys(schema, path or "the top")
        self._seen += 1
        if self._seen > MOST_SCHEMAS:
            raise GrammarError(f"the schema has more than {MOST_SCHEMAS} schemas in it, those of properties among them")
        out: JSON = {}
        for key, value in schema.items():
            at = f"{path}/{key}"
            if key in UNSUPPORTED and not _says_nothing(key, value):
                raise GrammarError(f"the keyword {key!r} is not supported (at {path or 'the top'} of the schema)")
            if key not in _KNOWN or (key == "format" and value not in FORMATS and "pattern" in schema):
                continue  # an annotation, or one that the pattern beside it says in full
            if (
                key == "pattern"
                and isinstance(value, str)
                and _LOOKS.search(value)
                and schema.get("format") in _KNOWN_FORMATS
            ):
                continue  # it looks ahead or back, as zod's for an email does, and says nearly what the format says
            if key in _NAMES and not (isinstance(value, str) and _REFERENCE.fullmatch(value)):
                continue  # some clients write a title there, and nothing can refer to that
            if key in _SEVERAL and isinstance(value, list):
                inner = [self.of(item, f"{at}/{i}", depth + 1) for i, item in enumerate(value)]
                out["anyOf" if key == "oneOf" and self._is_disjoint(value) and "anyOf" not in schema else key] = inner
            elif key in _NAMED and isinstance(value, dict):
                out[key] = {name: self.of(item, f"{at}/{name}", depth + 1) for name, item in value.items()}
            elif key in _ONE:
                out[key] = self.of(value, at, depth + 1)
            else:
                self._check_numbers(key, value, path or "the top")
                out[key] = value
        return out

    def _check_free_keys(self, schema: JSON, path: str) -> None:
        """Keys without a name of their own are counted as they are written, and one that comes twice is read as one: of
        two that must be there nobody could say that they differ. Raises GrammarError."""
        least, kinds, required = schema.get("minProperties"), schema.get("type", "object"), schema.get("required")
        named = len(set(map(str, required))) if isinstance(required, list) else 0
        if not isinstance(least, int | float) or "object" not in (kinds if isinstance(kinds, list) else [kinds]):
            return
        if least > named + 1:
            raise GrammarError(
                f"the keyword 'minProperties' is not supported beyond the required properties and one more, which are "
                f"{named + 1} (at {path} of the schema): a key may be written twice"
            )

    def _check_numbers(self, key: str, value: Any, path: str) -> None:
        """Numbers on which the compiler hangs or dies (seen in llguidance 1.9.1). Raises GrammarError."""
        if key in ("const", "enum") and (number := _too_large(value)) is not None:
            raise GrammarError(f"{key} has {str(number)[:30]}, which is beyond ±2^53 (at {path} of the schema)")
        if key == "multipleOf" and type(value) in (int, float) and 0 < value < math.inf:
            self._steps.append(Decimal(repr(value)))
            if _common_steps(self._steps) > MOST_STEPS:
                raise GrammarError(
                    f"multipleOf {str(value)[:30]} is too much (at {path} of the schema): the least common multiple of "
                    f"all that a schema has, without a decimal point, may be {MOST_STEPS}"
                )

    def _is_disjoint(self, options: list[Any]) -> bool:
        """Whether no value is valid by two of the options, since each requires a property to be of other constants: the
        form of unions that are told by a tag."""
        told = [dict(self._constants(self._resolved(option))) for option in options]
        for name in set.intersection(*map(set, told)) if told else ():
            values = [constants[name] for constants in told]
            if len(frozenset().union(*values)) == sum(map(len, values)):
                return True
        return False

    def _resolved(self, option: Any) -> Any:
        """The schema that a reference within this document names."""
        for _ in range(8):
            if not (isinstance(option, dict) and isinstance(ref := option.get("$ref"), str) and ref.startswith("#/")):
                break
            found: Any = self._root
            for step in ref[2:].split("/"):
                name = step.replace("~1", "/").replace("~0", "~")
                found = found.get(name) if isinstance(found, dict) else None
            option = found
        return option

    def _constants(self, schema: Any) -> Iterator[tuple[str, frozenset[str]]]:
        """Required properties of an object that can only be one of some texts."""
        if not isinstance(schema, dict) or schema.get("type") != "object":
            return
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, dict) or not isinstance(required, list):
            return
        for name, inner in properties.items():
            inner = self._resolved(inner)
            if name in required and isinstance(inner, dict):
                values = [inner["const"]] if "const" in inner else inner.get("enum")
                if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
                    yield name, frozenset(values)


def _too_large(value: Any) -> int | None:
    """A whole number in it that readers of JSON need not have exactly."""
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, int) and abs(one) > 2**53:
            return one
        stack += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return None


def _common_steps(steps: Sequence[Decimal]) -> int:
    """The least common multiple of the numbers as the compiler has them, which takes a state for each step of it: whole
    numbers of the smallest decimal place among them."""
    places = min(0, *(int(step.normalize().as_tuple().exponent) for step in steps))
    return math.lcm(*(int(step.scaleb(-places)) for step in steps))


def _says_nothing(keyword: str, value: Any) -> bool:
    """Whether an unsupported keyword has the value that every JSON satisfies."""
    if keyword == "propertyNames":  # names are texts; zod writes it for every record
        return value is True or value == {} or value == {"type": "string"}
    if keyword == "x-guidance":  # how JSON is spaced, which stays as it is; "lenient" would leave keywords out
        return isinstance(value, dict) and not value.get("lenient")
    return keyword == "uniqueItems" and value is False
