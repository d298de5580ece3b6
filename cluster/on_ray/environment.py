"""Environment of the processes of a Ray that serves Isotherm, and of who joins one. Ray reads some of it when it is
imported, so this module must not import Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

from isotherm.cluster.on_ray.run_file import local_address
from isotherm.cluster.on_ray.token_file import ELSEWHERE, keep_token

# Despite its name, on every system: with 0 Ray uses the loopback address and listens on no other, and a driver looks
# for its node there.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Of every node of a Ray that serves Isotherm, whoever starts it. docs/operations.md has them as a table.
NODE_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 would let any other process of the machine stall every stream
    # A worker that hangs cannot end itself: Ray's 5 s are 5 s more for streams that wait for it
    "RAY_kill_worker_timeout_milliseconds": "1000",
    # Where memory is short, Ray ends who began last: the controller, or an ingress replica, which gives none back. The
    # system ends the largest worker, and its loss is survived.
    "RAY_memory_monitor_refresh_ms": "0",
    # A process that stands ready for a worker has imported what that needs.
    "RAY_preload_python_modules": "isotherm.actors.preload",
    "RAY_AUTH_MODE": "token",
    # Serve's proxy would let any client switch off its timeouts and disconnect handling by headers; this strips
    # them, and brings the other middlewares and the protocol of the front door.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "isotherm.cluster.api.middleware:serve_proxy_middlewares",
    # A chunk of a stream goes from replica to proxy as a gRPC message, not as a Ray object, and from no event loop
    # to another: a third of the cost.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # A whole reply is one of them, and one with many log-probabilities has more than gRPC's 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # A proxy that has died is missed after three checks: in a second and a half, not in 30. One that does not answer
    # has Serve's 10 s, three times.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.3",
    # On a busy machine a proxy may take longer to start than Serve's 5 s, three times; then Serve would give up.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
# `isotherm serve` holds the front door's port, which Serve's proxies then can only share.
SHARED_PORT = {"SERVE_SOCKET_REUSE_PORT_ENABLED": "1"}
LOCAL_RAY = LOOPBACK | NODE_ENVIRONMENT | SHARED_PORT
# Of a Ray that is started here, unless they are set already: what Ray's own processes do without being asked takes
# cores from the streams. docs/operations.md says what is lost.
QUIET = {
    "RAY_task_events_report_interval_ms": "0",  # a record of every task and call, for `ray list tasks`
    "RAY_event_stats": "0",  # how long each handler of Ray's processes took, for their logs
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.2",  # Serve's 0.1 takes twice the time
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",  # Serve's 100; Ray passes metrics on every 10 s
}
# What never goes through an HTTP proxy: gRPC (from Serve's proxy to its replicas) takes http_proxy, and a proxy
# elsewhere cannot reach loopback.
UNPROXIED = ("127.0.0.1", "localhost", "::1")
GRPC_UNPROXIED = "no_grpc_proxy"
GCS_PORT = 6379  # where `ray start --head` and KubeRay put Ray's head


def prepare_local_ray() -> None:
    """Call before the first `import ray` of a process that will start a local Ray. Raises RayTokenError."""
    keep_token()
    os.environ.update(LOCAL_RAY)
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    _offer_commands()
    keep_from_proxies(UNPROXIED)


def _offer_commands() -> None:
    """Jobs of this Ray have its PATH, and look there for `isotherm`: where this one was called by its path, as `make
    serve` does, that would find none, or another."""
    own, path = os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, path])


def keep_from_proxies(hosts: Sequence[str]) -> None:
    """These hosts are asked directly, by this process and those that it starts, whatever proxy is set; all others as
    before."""

    def joined(*given: str) -> str:
        there = [host.strip() for host in ",".join(given).split(",") if host.strip()]
        return ",".join(dict.fromkeys([*there, *hosts]))

    either = [os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")]  # who reads one may not read the other
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = joined(*either)
    if given := os.environ.get(GRPC_UNPROXIED, ""):  # which gRPC prefers, where it is set
        os.environ[GRPC_UNPROXIED] = joined(given)


def prepare_attach(address: str | None) -> str | None:
    """Call before the first `import ray` of a process that will join a cluster. Gives the address to join: the one
    asked for, RAY_ADDRESS, or that of this machine's `isotherm serve`; None where there is none of these. Raises
    SeveralClustersError where several serve here and none is named."""
    address = address or os.environ.get("RAY_ADDRESS") or local_address()
    if address is not None and "://" in address and not address.startswith("ray://"):
        address = _head_of(address)
    if address is not None and address.removeprefix("ray://").startswith(("127.", "localhost:", "[::1]")):
        os.environ.update(LOOPBACK)
        keep_from_proxies(UNPROXIED)
    if "RAY_AUTH_MODE" not in os.environ and (
        any(name in os.environ for name in ELSEWHERE) or os.path.isfile(os.path.expanduser("~/.ray/auth_token"))
    ):
        os.environ["RAY_AUTH_MODE"] = "token"  # Ray looks for a token by itself only when it is given no address
    return address


def _head_of(url: str) -> str:
    """The Ray address behind that of a dashboard, to which `ray job submit` goes: as this machine's `isotherm serve`
    has noted it, or else Ray's usual port on the same host. What is no such URL is given back as it is."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return url
    if parts.scheme not in ("http", "https") or not host:
        return url
    if host in UNPROXIED and (found := local_address(port or (443 if parts.scheme == "https" else 80))) is not None:
        return found
    return f"[{host}]:{GCS_PORT}" if ":" in host else f"{host}:{GCS_PORT}"
