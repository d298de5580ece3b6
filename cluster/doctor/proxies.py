"""HTTP proxies that this user's programs are told to use. Isotherm's own processes ask loopback directly all the
same."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from isotherm.cluster.doctor.finding import Finding, ok, warn

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")


def look_at_proxies() -> Mapping[str, str]:
    return dict(os.environ)


def judge_proxies(environment: Mapping[str, str], nodes: Sequence[str] = ()) -> list[Finding]:
    """`nodes`: addresses of a cluster's, which are asked as well."""
    found = [name for name in environment if name.lower() in _PROXIES and environment[name]]
    if not found:
        return [ok("proxies", "none is set")]
    given = environment.get("no_proxy", "") or environment.get("NO_PROXY", "")
    direct = {host.strip() for host in given.split(",")}
    missing = [] if "*" in direct else [host for host in ("127.0.0.1", "localhost", *nodes) if host not in direct]
    words = f"{', '.join(sorted(found))} set"
    if not missing:
        return [ok("proxies", f"{words}, and not for {given}")]
    return [
        warn(
            "proxies",
            f"{words}, for {', '.join(missing)} too",
            f"clients such as curl would ask the proxy for them: export no_proxy={','.join([*filter(None, [given])])}"
            f"{',' if given else ''}{','.join(missing)}",
        )
    ]
