"""Python types as JSON schemas, and JSON text as values of them: structured output and tools, by pydantic."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema

from isotherm.cluster.client.errors import OutputInvalidError
from isotherm.cluster.errors import one_line
from isotherm.cluster.jsontypes import JSON


def response_format(kind: Any) -> JSON:
    """The `response_format` that has replies fit a type: a pydantic model, a dataclass, `list[int]`, …"""
    schema = _closed(_schema_of(kind))
    name = re.sub(r"\W+", "_", getattr(kind, "__name__", "reply"))[:64]
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


def _schema_of(kind: Any) -> JSON:
    """Raises TypeError where JSON has nothing like it, such as a function's `*args`."""
    try:
        return TypeAdapter(kind).json_schema()
    except PydanticInvalidForJsonSchema as error:
        raise TypeError(f"{getattr(kind, '__name__', kind)}: {one_line(error)}") from None


def tool(function: Callable[..., Any]) -> JSON:
    """An entry of `tools` for a Python function: its name, its docstring, and its annotated parameters."""
    description = {"description": text} if (text := inspect.getdoc(function)) else {}
    called: Any = function  # whose call pydantic knows as a type, which type checkers do not
    parameters = _closed(_schema_of(called))
    return {"type": "function", "function": {"name": function.__name__, **description, "parameters": parameters}}


def as_tool(given: Any) -> Any:
    """What may be given as a tool: a function, or an entry as it is sent."""
    return tool(given) if callable(given) else given


def arguments_of(function: Callable[..., Any], text: str, what: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """JSON text as what a function may be called with. Raises OutputInvalidError."""

    @wraps(function)  # with its signature, and without its errors
    def taken(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    found: tuple[tuple[Any, ...], dict[str, Any]] = checked_json(taken, text, what)
    return found


def checked_json(kind: Any, text: str, what: str) -> Any:
    """JSON text as a value of a type. Raises OutputInvalidError."""
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}".removeprefix(": ") for one in error.errors()
        )
        raise OutputInvalidError(f"{what}: {problems}", text) from None


def _closed(schema: Any) -> Any:
    """The schema without what is no JSON Schema, and its objects without room for more: a model that may add
    properties of its own goes on adding them."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed: JSON = {}
    for key, value in schema.items():
        if key in ("properties", "$defs"):  # names of the user's, whatever they are
            closed[key] = {name: _closed(one) for name, one in value.items()}
        elif key in ("default", "const", "enum", "examples"):
            closed[key] = value
        # The first is OpenAPI's; the second a set has, which takes values that stand twice, as no grammar counts them.
        elif key not in ("discriminator", "uniqueItems"):
            closed[key] = _closed(value)
    if "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed
