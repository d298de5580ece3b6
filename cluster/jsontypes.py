"""The names of what is read from JSON or written as it: checked by whoever reads it, and of no type before."""

from __future__ import annotations

from typing import Any, TypeAlias

JSONValue: TypeAlias = Any  # anything that JSON can hold
JSON: TypeAlias = dict[str, Any]  # an object
