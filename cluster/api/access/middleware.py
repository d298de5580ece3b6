"""Who asks, and whether he may: the front door's first question to every request."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isotherm.cluster.api.access.allowance import Allowance, Refusal
from isotherm.cluster.api.access.caller import ANYONE, ROLES, Caller, Role, known_of
from isotherm.cluster.api.access.key_store import Key, KeyStore, now
from isotherm.cluster.api.access.needs import is_open, is_work, needed_role
from isotherm.cluster.api.access.presented import presented
from isotherm.cluster.api.access.reach import Access, check_reach, operators_field
from isotherm.cluster.api.error_forms import send_error
from isotherm.cluster.api.errors import ReplyError

_OPERATOR = Caller(roles=frozenset(ROLES))  # where there are no keys, whoever may use the operator's routes
_NOBODY = Caller(roles=frozenset())  # where there are keys, whoever has none


class AccessMiddleware:
    """Gives each request its caller, or answers 401, 403 or 429. Stands behind PathMiddleware, so that there is one way
    to write a path. `limited` is told of each request that a key's limits refuse, and why."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        keys: KeyStore | None,
        limited: Callable[[Request, ReplyError], None] = lambda *_: None,
    ) -> None:
        self.app, self._access, self._keys, self._limited = app, access, keys, limited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        state = scope.setdefault("state", {})
        try:
            if self._keys is None:
                state["caller"] = self._without_keys(scope, path)
            else:
                key = await self._key(self._keys, scope, path)
                state["caller"] = _NOBODY if key is None else key.caller
                if key is not None:
                    state["may_still"] = partial(_may_still, self._keys, key, needed_role(scope["method"], path))
                if key is not None and key.allowance.counts:
                    state["allowance"] = key.allowance
                    send = _counting(key.allowance, send) if is_work(scope["method"], path) else send
                    self._count(key, Request(scope), path)
        except ReplyError as error:
            await send_error(path, error, send)
            return
        await self.app(scope, receive, send)

    def _without_keys(self, scope: Scope, path: str) -> Caller:
        if operators_field(path) is None:
            return ANYONE
        client = scope.get("client")
        check_reach(self._access, path, client[0] if client else None, Headers(scope=scope))
        return _OPERATOR

    async def _key(self, keys: KeyStore, scope: Scope, path: str) -> Key | None:
        """The key that the request has; None where it needs none. Raises ReplyError 401, 403, 503."""
        keys.begin()
        if (owner := scope["state"].get("owner")) is not None:
            # A row of a batch, which the application asks of itself: no client can set this.
            if (found := keys.named(owner)) is None:
                raise _unauthorized("invalid_api_key", _made_by_nobody(owner))
        elif is_open(path):
            return None
        elif (text := presented(Headers(scope=scope))) is None:
            how = "send it as `Authorization: Bearer KEY`, or as `x-api-key: KEY`"
            raise _unauthorized("missing_api_key", f"this server asks for an API key; {how}")
        elif (found := keys.known(text) or await keys.find(text)) is None:
            raise _unauthorized("invalid_api_key", "this API key is wrong, or was revoked")
        role = needed_role(scope["method"], path)
        if role is not None and role not in found.caller.roles:
            what, has = f"{scope['method']} {path[:100]}", ", ".join(sorted(found.caller.roles))
            message = f"{what} needs a key with the role {role}; {found.caller.name!r} has {has}"
            raise ReplyError(message, status=403, code="forbidden", kind="permission_error")
        return found

    def _count(self, key: Key, request: Request, path: str) -> None:
        if is_work(request.method, path) and (refusal := key.allowance.request(now())) is not None:
            error = rate_limited(key.caller, refusal)
            self._limited(request, error)
            raise error


def allowance_of(request: HTTPConnection) -> Allowance | None:
    """What is left to the key of a request; None where nothing is counted."""
    nothing: Allowance | None = None
    return known_of(request, "allowance", nothing)


def may_still_of(request: HTTPConnection) -> Callable[[], bool]:
    """For answers without an end: whether who asked might ask the same now. His key may be revoked meanwhile."""
    return known_of(request, "may_still", _always)


def _always() -> bool:
    return True


def _may_still(keys: KeyStore, key: Key, role: Role | None) -> bool:
    now = keys.still(key)
    return now is not None and (role is None or role in now.caller.roles)


def rate_limited(caller: Caller, refusal: Refusal) -> ReplyError:
    seconds = max(1, math.ceil(refusal.retry_after))
    limit = getattr(caller.limits, refusal.what)
    return ReplyError(
        f"key {caller.name!r} has used up its {refusal.what}, {limit}; try again in {seconds} s",
        status=429,
        code="rate_limit_exceeded",
        kind="rate_limit_error",
        headers={"retry-after": str(seconds)},
    )


def _unauthorized(code: str, message: str) -> ReplyError:
    headers = {"www-authenticate": "Bearer"}
    return ReplyError(message, status=401, code=code, kind="authentication_error", headers=headers)


def _made_by_nobody(owner: str) -> str:
    """Why a batch's rows cannot be asked."""
    if owner:
        return f"the key {owner!r}, which made this batch, is no more; make the batch again with another key"
    return "this batch was made while the server asked for no API key, and now it does; make it again with a key"


def _counting(allowance: Allowance, send: Send) -> Send:
    """Tells with the response what is left."""

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(allowance.headers(now()))
        await send(message)

    return send_on
