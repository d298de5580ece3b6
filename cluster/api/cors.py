"""Which pages of other sites may read answers in a browser: those of the origins that the manifest names, without
credentials."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
_RATE_LIMITS = tuple(
    f"x-ratelimit-{which}-{what}" for which in ("limit", "remaining", "reset") for what in ("requests", "tokens")
)
_EXPOSED = ("x-request-id", "request-id", "x-isotherm-timing", "retry-after", "x-should-retry", *_RATE_LIMITS)


def cors(origins: Sequence[str]) -> list[Middleware]:
    """What answers preflights and marks answers; nothing where there are no origins. `*` is everybody, and is said as
    such: an origin that is not named never comes back."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),
            expose_headers=_EXPOSED,
            max_age=3600,
        )
    ]
