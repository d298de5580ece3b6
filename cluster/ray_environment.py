"""Environment of a Ray that Isotherm starts itself. Ray reads some of it when it is imported, so this module must not import Ray."""

from __future__ import annotations

import os
from pathlib import Path

from isotherm.cluster.run_file import local_address

# Despite its name, on every system: with 0 Ray uses the loopback address and listens on no other, and a driver looks for its node there.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
LOCAL_RAY = LOOPBACK | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 would let any other process of the machine stall every stream
    "RAY_kill_worker_timeout_milliseconds": "1000",  # a worker that hangs cannot end itself: Ray's 5 s are 5 s more for streams that wait for it
    "RAY_AUTH_MODE": "token",  # Ray makes a token in ~/.ray where there is none
    # Serve's proxy would let any client switch off its timeouts and disconnect handling by headers; this strips them.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "isotherm.cluster.http_middleware:serve_proxy_middlewares",
    # A chunk of a stream goes from replica to proxy as a gRPC message, not as a Ray object, and from no event loop to another: a third of the cost.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


def prepare_local_ray() -> None:
    """Call before the first `import ray` of a process that will start a local Ray."""
    os.environ.update(LOCAL_RAY)


def prepare_attach(address: str | None) -> str | None:
    """Call before the first `import ray` of a process that will join a cluster. Gives the address to join: the one asked for, RAY_ADDRESS, or
    that of this machine's `isotherm serve`; None where there is none of these."""
    address = address or os.environ.get("RAY_ADDRESS") or local_address()
    if address is not None and address.removeprefix("ray://").startswith(("127.", "localhost:", "[::1]")):
        os.environ.update(LOOPBACK)
    if "RAY_AUTH_MODE" not in os.environ and ("RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").is_file()):
        os.environ["RAY_AUTH_MODE"] = "token"  # Ray looks for a token by itself only when it is given no address
    return address
