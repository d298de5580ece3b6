"""From the bytes of a request's body to its checked form, or to an error that names the first field that is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from pydantic import ValidationError

from isotherm.cluster.api.bodies.common import BodyModel
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.jsontypes import JSON

_Body = TypeVar("_Body", bound=BodyModel)
_SHOWN = 100  # characters of a key in a field's name: those of free objects may have any number
_Path: TypeAlias = "tuple[_Path, str | int] | None"  # the way to where a value stands, and the last step


def parse_body(model: type[_Body], body: bytes) -> _Body:
    """The checked request. Raises ReplyError 400 that names the first wrong field."""
    return checked(model, json_object(body))


def checked(model: type[_Body], data: JSON) -> _Body:
    """As `parse_body`, of what has been read already."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _reply_error(error.errors(include_url=False)[0], data) from None


def json_object(body: bytes) -> JSON:
    """The object that a body is, before its fields are looked at. Raises ReplyError 400."""
    not_finite: list[float] = []

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            not_finite.append(value)
        return value

    try:
        data: Any = json.loads(body.decode("utf-8"), parse_float=number, parse_constant=number)
    except UnicodeDecodeError as error:
        raise ReplyError(f"the body is not valid UTF-8: {error}") from None
    except RecursionError:
        raise ReplyError("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ReplyError(f"the body is not valid JSON: {error}") from None
    except ValueError:  # Python's own limit, whose words are for programmers
        raise ReplyError("the body has an integer of too many digits") from None
    if not isinstance(data, dict):
        raise ReplyError(f"the body must be a JSON object, got {_json_type(data)}")
    if b"\\u" in body and (path := _where(data, _is_unpaired)) is not None:
        raise _refused(path, "text with an unpaired surrogate has no UTF-8 form")
    if not_finite and (path := _where(data, _is_not_finite)) is not None:
        raise _refused(path, "a number must be finite: NaN and Infinity are none of JSON, and 1.8e308 is the largest")
    found: JSON = data
    return found


def _reply_error(error: Any, data: JSON) -> ReplyError:
    """OpenAI's form of a pydantic error. Its location also holds tags of union members, which are no part of the
    client's JSON."""
    path: list[str | int] = []
    at: Any = data
    for step in error["loc"]:
        in_object = isinstance(at, dict) and isinstance(step, str) and step in at
        in_array = isinstance(at, list) and isinstance(step, int) and step < len(at)
        if in_object or in_array:
            at = at[step]
        elif not (error["type"] == "missing" and step == error["loc"][-1]):
            continue
        path.append(step)
    kind, message, loc = error["type"], error["msg"], error["loc"]
    if loc[-1:] == ("[key]",) and path and error["input"] == path[-1]:
        message = f"the key {shown(path[-1])} {message[0].lower()}{message[1:]}".replace(" string should", " should")
    elif kind.startswith("field:"):
        path.append(kind.removeprefix("field:"))
    elif kind == "missing":
        message = "this field is required"
    elif kind.startswith("union_tag") and isinstance(at, dict) and (named := _discriminator(error)):
        # The field that says which kind of object it is: it is absent, or of another kind.
        path.append(named)
        expected = error["ctx"].get("expected_tags")
        message = f"must be one of {expected}, got {shown(at.get(named))}" if expected else "this field is required"
    else:
        message = re.sub(r"a valid dictionary( or instance of \w+)?", "an object", message)
        if kind == "literal_error":
            message = _PYTHONS.sub(lambda word: json.dumps(_CONSTANTS[word[0]]), message)
        message = f"{message[0].lower()}{message[1:].replace(' after validation', '')}, got {shown(at)}"
    param = _param(path)
    says_it = kind.startswith("field:") and param and message.startswith(param.rsplit(".", 1)[-1])
    return ReplyError(message if says_it else f"{param}: {message}", param=param)


def _discriminator(error: Any) -> str:
    """The field that tells the members of a union apart; empty where it is no field."""
    found = re.fullmatch(r"'(\w+)'", error["ctx"]["discriminator"])
    return found[1] if found else ""


def _param(path: list[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step[:_SHOWN]}" for step in path).lstrip(".")


def shown(value: Any) -> str:
    """A value of the client's in an error, in a few words."""
    if isinstance(value, dict | list):
        return f"{_json_type(value)} of {len(value)}"
    if type(value) is int and value.bit_length() > 64:
        return "a number of more than 64 bits"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _json_type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names[type(value)]


def _refused(path: list[str | int], wrong: str) -> ReplyError:
    param = _param(path)
    return ReplyError(f"{param}: {wrong}", param=param or None)


def _where(value: Any, is_wrong: Callable[[Any], bool]) -> list[str | int] | None:
    """Where a value or a key is wrong, if anywhere. Paths share what they have in common: a body may be nested deep,
    with values at every depth."""
    stack: list[tuple[_Path, Any]] = [(None, value)]
    while stack:
        path, item = stack.pop()
        if isinstance(item, dict):
            for key, inner in item.items():
                if is_wrong(key):
                    return _steps(path)
                stack.append(((path, key), inner))
        elif isinstance(item, list):
            stack.extend(((path, i), inner) for i, inner in enumerate(item) if isinstance(inner, _LOOKED_AT))
        elif is_wrong(item):
            return _steps(path)
    return None


_CONSTANTS = {"True": True, "False": False, "None": None}
_PYTHONS = re.compile(r"(?<!['\w])(?:True|False|None)(?!['\w])")  # not where it is a text
_LOOKED_AT = (str, float, dict, list)


def _steps(path: _Path) -> list[str | int]:
    steps: list[str | int] = []
    while path is not None:
        path, step = path
        steps.append(step)
    return steps[::-1]


def _is_unpaired(value: Any) -> bool:
    """Whether it is a text that can't be encoded. JSON allows "\\ud800"; UTF-8, and with it the tokenizer, does not."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
