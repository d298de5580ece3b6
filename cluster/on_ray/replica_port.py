"""Where a Serve replica listens for requests from Serve's proxies: at its node's own address, not at every one.

Ray Serve has no option for it, so the function by which it opens the port is replaced (ray/serve/_private/replica.py,
`_on_initialized`)."""

from __future__ import annotations

from typing import Any

import ray
from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve._private import replica


def listen_at_node_address_alone() -> None:
    """For this process's replica, which opens its port when its application has been built. Proxies ask at the address
    that Ray knows of the node; of a local Ray that is a loopback one."""
    node = ray.util.get_node_ip_address()
    host = f"[{node}]" if ":" in node else node

    def add(server: Any, address: str) -> int:
        port: int = add_port_to_grpc_server(server, f"{host}:{address.rpartition(':')[2]}")
        return port

    replica.add_port_to_grpc_server = add  # type: ignore[attr-defined]
