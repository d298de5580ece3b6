"""The engine and its front door in the client's own process: what `Client.local` is connected to.

They stand above the client, which also works where neither torch nor a model is: so it knows a name, and loads what
bears it when it is asked to. That is cluster/local/server.py."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

SERVER = "isotherm.cluster.local.server"
URL = "http://localhost"  # there has to be one; requests go to the socket


class LocalServer(Protocol):
    """A front door that listens at a Unix socket, for this process alone."""

    @property
    def socket(self) -> str:
        """Its path."""

    def close(self) -> None:
        """End it, its open requests and its engine."""


def start(model: str) -> LocalServer:
    """Load a model (a directory, a hub id, "tiny", or a manifest) and serve it in threads of this process; takes as
    long as loading does. Raises what `isotherm serve` says of models and manifests that cannot be served."""
    return cast("LocalServer", importlib.import_module(SERVER).serve_in_process(model))
