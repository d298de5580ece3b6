"""Where a command asks that talks HTTP to the cluster, where it is not told."""

from __future__ import annotations

import os

from isotherm.cluster.client.calls import DEFAULT_URL
from isotherm.cluster.on_ray.environment import prepare_attach
from isotherm.cluster.on_ray.run_file import local_url

URL_HELP = "where `isotherm serve` listens; default: as this machine's cluster says, or else " + DEFAULT_URL


def served_url(url: str | None) -> str:
    """As it is told; else the front door of the cluster of RAY_ADDRESS, or of the only one that this user has on this
    machine, or the port that `isotherm serve` has by itself. Raises NoClusterError, SeveralClustersError."""
    if url is not None:
        return url
    if os.environ.get("RAY_ADDRESS"):
        return running_url(None)
    return local_url() or DEFAULT_URL


def running_url(address: str | None) -> str:
    """The front door of the cluster at a Ray address, or of the one that runs here, which needs no Ray to be found.
    Raises NoClusterError, SeveralClustersError."""
    if not address and not os.environ.get("RAY_ADDRESS") and (found := local_url()) is not None:
        return found
    address = prepare_attach(address)
    from isotherm.cluster.on_ray.session import cluster_url

    return cluster_url(address)
