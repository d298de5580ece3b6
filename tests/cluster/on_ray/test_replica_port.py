from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.serve._private import replica

from isotherm.cluster.on_ray.replica_port import listen_at_node_address_alone


class Server:
    def __init__(self) -> None:
        self.addresses: list[str] = []

    def add_insecure_port(self, address: str) -> int:
        self.addresses.append(address)
        return 4321


@pytest.mark.parametrize(("node", "address"), [("127.0.0.1", "127.0.0.1:0"), ("::1", "[::1]:0")])
def test_a_replica_listens_at_the_address_of_its_node(monkeypatch: pytest.MonkeyPatch, node: str, address: str):
    monkeypatch.setattr(replica, "add_port_to_grpc_server", replica.add_port_to_grpc_server)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    listen_at_node_address_alone()
    server: Any = Server()
    # As ray/serve/_private/replica.py calls it.
    assert replica.add_port_to_grpc_server(server, "[::]:0") == 4321 and server.addresses == [address]
