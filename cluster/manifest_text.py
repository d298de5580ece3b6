"""A manifest as it is written: YAML in which no key stands twice, and what is wrong with a value in our words. Pure."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError

_short = reprlib.Repr()
_short.maxlevel = 2  # a value that holds itself many times over, as YAML's aliases can make it, would fill the screen


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """PyYAML takes the last of two, and a section that is pasted twice would lose all that its first one says: who
        may ask, for one."""
        node = super().compose_mapping_node(anchor)
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (first := seen.get(key.value)) is not None:
                    raise ComposerError(f"{key.value} stands here", first.start_mark, "and here again", key.start_mark)
                seen[key.value] = key
        return node


# PyYAML's numbers need a point and a sign in 1.0e+3: 1e3, which everybody else reads as a number, would be a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def decode(text: str) -> Any:
    """Raises yaml.YAMLError, ValueError (a date such as 2001-99-99) or RecursionError."""
    return yaml.load(text, _Loader)


def problem(error: ErrorDetails, fields_at: Callable[[tuple[int | str, ...]], Sequence[str]]) -> str:
    """One of pydantic's errors in our words, with the field and the value. `fields_at`: the fields of the section at a
    location."""
    location = error["loc"]
    field, value = ".".join(map(str, location)), _short.repr(error["input"])
    match error["type"]:
        case "missing":
            return f"{field} is missing: it must be given"
        case "invalid_key":
            return f"{field} is a name that YAML reads as {value}: names of fields must be strings"
        case "extra_forbidden":
            hint = f"unknown field; known here: {', '.join(fields_at(location[:-1]))}"
        case "model_type":
            hint = f"must be a mapping of {', '.join(fields_at(location))}"
        case _:
            hint = _allowed(error["msg"])
    return f"{field} is {value}: {hint}"


def _allowed(message: str) -> str:
    """pydantic's words, in ours: "must be …"."""
    message = message.removeprefix("Value error, ").replace("Input should be", "must be")
    message = re.sub(r"^(String|List|Dictionary) should ", "must ", message)
    return re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping", message)
