"""What each route needs of the key that asks for it. Pure."""

from __future__ import annotations

from isotherm.cluster.api.access.caller import Role

# Whoever balances load, or starts a machine again, has no key. /ready says no reason where there are keys.
OPEN = ("/health", "/ready")
# They say nothing of a request, of anyone's data or of the cluster.
ANY_ROLE = ("/v1/models", "/version", "/openapi.json", "/docs")
_LOOKS = ("GET", "HEAD")


def is_open(path: str) -> bool:
    """Whether a request needs no key."""
    return path in OPEN


def needed_role(method: str, path: str) -> Role | None:
    """The role that a route needs; None: any. A path that nobody knows needs one too, so that a new route is no hole
    until its line is here."""
    if path in ("/status", "/metrics"):
        return "observe"
    if _below(path, "/admin"):
        return "observe" if method in _LOOKS else "admin"
    return None if any(_below(path, one) for one in ANY_ROLE) else "use"


def is_work(method: str, path: str) -> bool:
    """Whether a request counts in a key's requests per minute: all that has the model, or the server, do something."""
    return method == "POST" and needed_role(method, path) == "use"


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")
