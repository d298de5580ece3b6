"""The proxy through which another machine is asked, as the environment names it. httpx's own reading of it makes every
proxy that is named, needed or not, and where one of them cannot be had it says neither which nor where."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from urllib.request import getproxies

import httpx

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.loopback import reaches_this_machine

_MOST_PORT = 65535
_CREDENTIALS = re.compile(r"//.*@")


class ProxyError(IsothermError, ValueError):
    """The environment names a proxy that cannot be used; the message names the variable."""


def proxy_for(url: httpx.URL) -> httpx.Proxy | None:
    """None for a server that is asked directly: on this machine, in no_proxy, or where no proxy is named. Raises
    ProxyError."""
    found = getproxies()
    entries = [entry.strip().lower() for entry in found.get("no", "").split(",")]
    if reaches_this_machine(url.host) or any(_covers(entry, url) for entry in entries if entry):
        return None
    kind = next((kind for kind in (url.scheme, "all") if found.get(kind)), None)
    return None if kind is None else _made(_variable(kind), found[kind], url)


def _covers(entry: str, url: httpx.URL) -> bool:
    """Whether an entry of no_proxy means this server: "*", a name or any that ends with it, an address; with a port or
    a scheme that one alone."""
    scheme, _, place = entry.rpartition("://")
    if entry == "*" or scheme not in ("", "all", url.scheme):
        return entry == "*"
    name, host = place.lstrip("*").lstrip(".").replace("[", "").replace("]", ""), url.host.lower()
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return name in (host, f"{host}:{port}") or host.endswith(f".{name}")


def _variable(kind: str) -> str:
    """Where a user finds it: small letters come first."""
    names = (f"{kind}_proxy", f"{kind.upper()}_PROXY")
    return next((name for name in names if os.environ.get(name)), f"the system's {kind} proxy")


def _made(variable: str, value: str, url: httpx.URL) -> httpx.Proxy:
    said = f"{variable} is {_CREDENTIALS.sub('//…@', value)!r}"
    otherwise = f"or name {url.host} in no_proxy to ask it directly"
    try:
        proxy = httpx.Proxy(value if "://" in value else f"http://{value}")
    except (ValueError, httpx.InvalidURL):
        proxy = None
    if proxy is None or not proxy.url.host or (proxy.url.port or 0) > _MOST_PORT:
        raise ProxyError(f"{said}: it must be a proxy such as http://HOST:PORT; {otherwise}")
    if proxy.url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ProxyError(f"{said}: a SOCKS proxy needs `pip install 'httpx[socks]'`; name another, {otherwise}")
    return proxy
