"""What `isotherm serve` says when it serves."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from isotherm.cluster.deploy.announcement import announce
from isotherm.cluster.manifest import parse_manifest

ALONE, ALL = "this machine alone", "whoever reaches the port, for there are no keys"


@pytest.mark.parametrize(
    ("http", "admin", "metrics"),
    [
        ({}, ALONE, ALONE),
        ({"metrics": "open"}, ALONE, ALL),
        ({"admin": "open"}, ALL, ALONE),
        ({"admin": "open", "metrics": "open"}, ALL, ALL),
    ],
)
def test_it_says_who_may_reach_which_routes(http: dict[str, Any], admin: str, metrics: str):
    assert announced(http, asks_for_keys=False) == [
        f"open to {admin}: /admin and /status",
        f"open to {metrics}: /metrics",
    ]


@pytest.mark.parametrize(
    ("http", "source"),
    [
        ({"keys": "/etc/keys.json"}, "those of /etc/keys.json"),
        ({}, "the one of ISOTHERM_API_KEY"),
        ({"keys": "/etc/[prod]/keys[/].json"}, "those of /etc/[prod]/keys[/].json"),
    ],
)
def test_it_says_which_keys_are_asked_for(http: dict[str, Any], source: str):
    """What is open without keys does not count then."""
    told = announced(http | {"admin": "open"}, asks_for_keys=True)
    assert told == [f"every route but /health, /ready and the page at / asks for a key: {source}"]


def announced(http: dict[str, Any], asks_for_keys: bool, *kernels: str) -> list[str]:
    """What `isotherm serve` prints below the request that can be copied."""
    out = io.StringIO()
    console = Console(file=out, width=60)
    workers = [{"id": str(number), "kernels_reason": words} for number, words in enumerate(kernels)]
    announce(parse_manifest({"http": http}), asks_for_keys, [*workers, {"id": "silent"}], console)
    ready, request, body, *rest = out.getvalue().splitlines()
    assert ready.startswith("ready ") and "-d '{" in body
    assert ('"Authorization: Bearer $ISOTHERM_API_KEY"' in request) == asks_for_keys
    return [line.strip() for line in rest]


def test_it_says_once_with_which_kernels_workers_compute():
    native, plain = "native C++ kernels, avx2, 2 threads, bfloat16", "plain torch, as asked for"
    told = announced({}, False, native, plain, native)
    assert told[:2] == [f"kernels: {native}", f"kernels: {plain}"] and "kernels" not in "".join(told[2:])
