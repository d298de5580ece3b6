"""A prepared request held against what its key may still take now."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from starlette.requests import Request

from isotherm.cluster.api.access.caller import caller_of
from isotherm.cluster.api.access.key_store import now
from isotherm.cluster.api.access.limits import check_streams
from isotherm.cluster.api.access.middleware import allowance_of, rate_limited
from isotherm.cluster.api.prepare import Prepared


def metered(request: Request, prepared: Prepared, places: ExitStack) -> Prepared:
    """The request, let in: its streams are counted until `places` is closed, its prompts' tokens at once, its outputs'
    as they come. Raises ReplyError 400 and 429."""
    if (allowance := allowance_of(request)) is None:
        return prepared
    streams = len(prepared.requests)
    check_streams(caller_of(request), streams)
    if (refusal := allowance.generation(prepared.prompt_tokens, streams, now())) is not None:
        raise rate_limited(caller_of(request), refusal)
    places.callback(allowance.ended, streams)
    if not allowance.counts_tokens:
        return prepared
    return replace(prepared, meter=lambda tokens: allowance.used(tokens, now()))
