"""On whose behalf a request is made, and what follows for the engine: whose share it counts for, whose cache it may
use, when its turn is."""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request

from isotherm.cluster.api.access.caller import caller_of, known_of
from isotherm.cluster.api.prepare import Prepared
from isotherm.cluster.engine.places import Claim, band_of
from isotherm.cluster.messages.requests import GenerationRequest


def in_process_priority(request: Request) -> int | None:
    """Of a request that this process makes itself, for a batch; None for one that came over HTTP."""
    none: int | None = None
    return known_of(request, "priority", none)


def claim_for(request: Request) -> Claim:
    """Whose places it takes, as far as that is known before its body is read."""
    caller, said = caller_of(request), in_process_priority(request)
    return Claim(caller.name, caller.weight, band_of(caller.priority if said is None else said))


def on_behalf(prepared: Prepared, request: Request, shared_cache: bool) -> Prepared:
    """With what the engine has to know of who asks. Shares are those of keys, whatever `user` a body names: else a
    client could have one share after the other. No request comes before those of its key's own priority."""
    caller, said = caller_of(request), in_process_priority(request)
    asked = prepared.body.priority
    if said is None and not caller.name:
        return prepared
    priority = prepared.requests[0].priority if asked is not None else caller.priority if said is None else said

    def named(one: GenerationRequest) -> GenerationRequest:
        if not caller.name:
            return replace(one, priority=priority)
        tenant, best = "" if shared_cache else caller.tenant, max(priority, caller.priority)
        return replace(one, priority=best, key=caller.name, weight=caller.weight, tenant=tenant)

    return replace(prepared, requests=tuple(map(named, prepared.requests)))
