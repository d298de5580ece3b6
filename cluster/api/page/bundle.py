"""The files of the page, read once, and the routes that hand them out: packed, and asked for again only where they have
changed."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from isotherm.cluster.api.errors import ReplyError

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing comes from elsewhere, nothing is run that is not one of these files, and no text can become markup: where a
# script tries to make it so, Trusted Types stop it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "cache-control": "no-cache",  # it may be kept, and is asked for anew: so page and server are of one version
    "vary": "accept-encoding",
}


@dataclass(frozen=True)
class Asset:
    """One file. `packed`: with gzip."""

    type: str
    etag: str
    plain: bytes
    packed: bytes


@cache
def assets() -> Mapping[str, Asset]:
    """By the file's name."""
    found = {}
    for entry in sorted(files(__package__).joinpath("static").iterdir(), key=lambda entry: entry.name):
        kind = _TYPES.get(entry.name[entry.name.rfind(".") :])
        if kind is not None:
            data = entry.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()[:20]}"'
            found[entry.name] = Asset(kind, etag, data, gzip.compress(data, 9, mtime=0))
    return found


def page_routes() -> list[Route]:
    """GET / and GET /page/{name}."""

    async def index(request: Request) -> Response:
        return _answer(request, assets()["index.html"])

    async def one(request: Request) -> Response:
        name = request.path_params["name"]
        found = assets().get(name)
        if found is None or name == "index.html":
            raise ReplyError(f"the page has no file {name[:100]!r}", status=404, code="not_found")
        return _answer(request, found)

    return [Route("/", index), Route("/page/{name}", one)]


def _answer(request: Request, asset: Asset) -> Response:
    packed = "gzip" in request.headers.get("accept-encoding", "")
    etag = f'{asset.etag[:-1]}-gz"' if packed else asset.etag  # the bytes differ
    known = {one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")}
    if etag in known:
        return Response(status_code=304, headers={**HEADERS, "etag": etag})
    coding = {"content-encoding": "gzip"} if packed else {}
    body = asset.packed if packed else asset.plain
    return Response(body, 200, {**HEADERS, **coding, "etag": etag}, asset.type)
