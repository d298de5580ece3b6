"""The limits of a key, held against what a body asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from isotherm.cluster.api.access.caller import Caller
from isotherm.cluster.api.errors import ReplyError


class _Body(Protocol):
    @property
    def n(self) -> int | None: ...

    @property
    def priority(self) -> int | None: ...

    @property
    def samples(self) -> int: ...

    @property
    def output_limit(self) -> int | None: ...


def allowed_models(caller: Caller, names: Sequence[str]) -> tuple[str, ...]:
    """Of the served model's names those under which the caller may ask for it. Raises ReplyError 403 where there is
    none."""
    models = caller.limits.models
    found = tuple(name for name in names if models is None or name in models)
    if not found:
        message = f"key {caller.name!r} may use none of the models that are served here"
        raise ReplyError(message, status=403, param="model", code="model_not_allowed", kind="permission_error")
    return found


def check_limits(caller: Caller, body: _Body) -> None:
    """Raises ReplyError naming the field that asks for more than the caller may have."""
    limits = caller.limits
    samples = "n" if body.samples == (body.n or 1) else "best_of"
    if limits.n is not None and body.samples > limits.n:
        raise _too_much(caller, samples, f"{body.samples} choices are more than the {limits.n}")
    if limits.streams is not None and body.samples > limits.streams:
        raise _too_much(caller, samples, f"{body.samples} choices are more than the {limits.streams} streams")
    wanted, most = body.output_limit, limits.max_tokens
    if most is not None and wanted is not None and wanted > most:
        raise _too_much(caller, _output_field(body), f"{wanted} tokens are more than the {most}")
    if caller.name and body.priority is not None and body.priority < caller.priority:
        raise _too_much(caller, "priority", f"{body.priority} comes before the {caller.priority}")


def check_streams(caller: Caller, streams: int) -> None:
    """Raises ReplyError where one request alone is of more streams than the caller may have open."""
    most = caller.limits.streams
    if most is not None and streams > most:
        what = f"{streams} streams, one for each choice of each prompt, are more than the {most}"
        raise _too_much(caller, "prompt", what)


def most_tokens(caller: Caller, room: int) -> int:
    """Of the output of a body that does not say, where so many are possible."""
    return room if caller.limits.max_tokens is None else min(room, caller.limits.max_tokens)


def _output_field(body: object) -> str:
    given = getattr(body, "max_completion_tokens", None) is not None
    return "max_completion_tokens" if given else "max_tokens"


def _too_much(caller: Caller, param: str, what: str) -> ReplyError:
    message = f"{param}: {what} that key {caller.name!r} may ask for"
    return ReplyError(message, param=param, code="key_limit_exceeded")
