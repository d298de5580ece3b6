"""The names of what Ray gives back without a type."""

from __future__ import annotations

from typing import Any, TypeAlias

ActorHandle: TypeAlias = Any  # its methods are called with `.remote(…)`, and awaited or given to ray.get
Reference: TypeAlias = Any  # to what such a call will give
