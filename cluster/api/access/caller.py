"""Who asks: the name behind a request's API key, and what the key allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from starlette.requests import HTTPConnection

Role = Literal["use", "observe", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
_NOTHING: dict[str, Any] = {}
_T = TypeVar("_T")


@dataclass(frozen=True)
class KeyLimits:
    """What one key may take. None: as much as the server gives anyone."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and outputs
    streams: int | None = None  # generations at once, one for each choice
    n: int | None = None
    max_tokens: int | None = None  # of one choice
    models: frozenset[str] | None = None


@dataclass(frozen=True)
class Caller:
    """Whoever a request comes from. Every request has one, in `request.state.caller`."""

    name: str = ""  # of the key; "" where the server has no keys
    roles: frozenset[str] = frozenset({"use"})
    tenant: str = ""  # requests of one tenant share a prefix cache
    weight: float = 1.0  # share of the server beside other keys
    priority: int = 0  # of requests that say none, and the best that they may ask for; lower values come first
    limits: KeyLimits = field(default_factory=KeyLimits)


ANYONE = Caller()


def caller_of(request: HTTPConnection) -> Caller:
    """Who made this request."""
    return known_of(request, "caller", ANYONE)


def known_of(request: HTTPConnection, name: str, default: _T) -> _T:
    """What a middleware has written down of this request, as `request.state` has it: an attribute that is not there
    costs two exceptions."""
    found: _T = request.scope.get("state", _NOTHING).get(name, default)
    return found
