"""Where the two ends of a new link find each other: one key-value store for a cluster."""

from __future__ import annotations

import socket

from torch.distributed import TCPStore


class Rendezvous:
    """Hosts the key-value store through which new links find each other; on one address only, at a port of its own."""

    def __init__(self, host: str):
        listener = socket.create_server((host, 0))
        self.host, self.port = host, listener.getsockname()[1]
        self._store = TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
