"""Who may use the operator's routes where there are no API keys: processes of the machine that serves, unless the
manifest opens the routes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.loopback import is_loopback, reaches_this_machine

Reach = Literal["loopback", "open"]
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


@dataclass(frozen=True)
class Access:
    """`admin`: /admin/* and /status; `metrics`: /metrics. Each is the name of a field of the manifest's `http` too."""

    admin: Reach = "loopback"
    metrics: Reach = "loopback"


def operators_field(path: str) -> str | None:
    """The field of Access that a path falls under; None for one that everyone may use."""
    if path == "/metrics":
        return "metrics"
    return "admin" if path in ("/admin", "/status") or path.startswith("/admin/") else None


def check_reach(access: Access, path: str, peer: str | None, headers: Mapping[str, str]) -> None:
    """Raises ReplyError 403 where the path is an operator's and the request comes from elsewhere."""
    field = operators_field(path)
    if field is None or getattr(access, field) == "open":
        return
    if (reason := why_not_local(peer, headers)) is not None:
        raise ReplyError(
            f"{path[:100]} answers only processes of the machine that serves, and {reason}; `http.{field}: open` in "
            "the manifest opens it to everyone who reaches the port",
            status=403,
            param=f"http.{field}",
            code="forbidden",
            kind="permission_error",
        )


def why_not_local(peer: str | None, headers: Mapping[str, str]) -> str | None:
    """Why a request does not come from this machine's own processes; None where it does. What a header says is never a
    reason to let somebody in. But a proxy on this machine says in one that it speaks for another, and a browser that it
    does so for a page of another site. A page whose own name was bound to this machine's address meanwhile is of the
    same site as the server for a browser, which then says nothing but that name, as the host."""
    if not is_loopback(peer):
        return f"this request comes from {peer or 'an unknown address'}"
    if any(name in headers for name in _FORWARDED):
        return "this request came through a proxy"
    host, origin = headers.get("host", ""), headers.get("origin")
    if host and not _is_loopback_host(host):
        return f"this request is for {host[:100]!r}, not for localhost or a loopback address"
    if origin not in (None, f"http://{host}", f"https://{host}"):
        return "this request was made by a page of another site"
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return "this request was made by a page of another site"
    return None


def _is_loopback_host(host: str) -> bool:
    """`host`: the header, with or without a port."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:  # brackets that do not close
        return False
    # Names below localhost are this machine's too, whoever is asked (RFC 6761).
    return reaches_this_machine(name) or name.endswith(".localhost")
