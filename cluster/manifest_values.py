"""The values that fields of the manifest have: sizes, labels, addresses, origins, paths, one of several names. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

UNITS = {
    "": 1,
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_bytes(value: Any) -> Any:
    """ "512MiB" → 536870912; numbers are bytes already."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(B|[KMGT]i?B)?\s*", value)
    if match is None:
        raise ValueError(f"must be bytes or a size such as 512MiB or 4GB (units: {', '.join(filter(None, UNITS))})")
    return int(Decimal(match[1]) * UNITS[match[2] or ""])


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, le=1 << 60)]
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    """Names of Ray node labels, and for each what a node must have: a value, !value, in(a,b) or !in(a,b)."""
    for name, selector in labels.items():
        if not re.fullmatch(rf"([A-Za-z0-9.-]+/)?{_LABEL}", name):
            raise ValueError(f'"{name}" must be a label name such as role or example.com/role')
        if not re.fullmatch(rf"!?{_LABEL}|!?in\({_LABEL}(, ?{_LABEL})*\)", selector):
            raise ValueError(f'{name}: "{selector}" must be a label value, !value, in(a,b) or !in(a,b)')
    return labels


def one_of(choices: Callable[[], Sequence[str]]) -> BeforeValidator:
    """Refuses what is none of the choices there are when it is checked; what is no string is told them too."""

    def check(value: object) -> object:
        if value not in (known := choices()):
            raise ValueError(f"must be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}")
        return value

    return BeforeValidator(check)


def check_origin(origin: str) -> str:
    """As browsers write it: a scheme, a host, a port where it is not the scheme's own."""
    if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\\?#@\s]+", origin):
        raise ValueError('must be an origin such as https://example.org or http://localhost:3000, or "*"')
    return origin


def check_address(host: str) -> str:
    """A name or an IP address to bind: neither a URL, nor with a port."""
    try:
        ip_address(host)
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", host):
            raise ValueError("must be an IP address or a host's name, without a scheme and a port") from None
    return host


def check_endpoint(url: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        raise ValueError("must be a URL such as http://localhost:4318/v1/traces")
    if "@" in url.split("/")[2]:
        raise ValueError(
            "must not have a name and a password in it: whoever observes the cluster can read the manifest's values; "
            "set OTEL_EXPORTER_OTLP_HEADERS where isotherm serve is started"
        )
    return url


def check_absolute(path: str) -> str:
    if not Path(path).is_absolute() or "\0" in path:
        raise ValueError(f"must be an absolute path, not {path!r}")
    return path


Address = Annotated[str, AfterValidator(check_address)]
Endpoint = Annotated[str, AfterValidator(check_endpoint)]
AbsolutePath = Annotated[str, AfterValidator(check_absolute)]
Origin = Annotated[str, AfterValidator(check_origin)]
Labels = Annotated[dict[str, str], AfterValidator(check_labels)]
