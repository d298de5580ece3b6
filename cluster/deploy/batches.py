"""Where an ingress replica keeps files and batches, and whether it can: what one replica is told, all must see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from isotherm.cluster.api.batches.service import BatchLimits, BatchService
from isotherm.cluster.deploy.batch_store import batch_store
from isotherm.cluster.manifest import HttpSection


def batches_refused(http: HttpSection) -> str:
    """Why this server takes no files and batches; empty where it does."""
    if http.replicas == 1 or http.batches.folder is not None:
        return ""
    return (
        f"http.replicas is {http.replicas}, and each replica would keep its own; name a folder in http.batches.folder "
        "that all of them see"
    )


def batch_service(http: HttpSection, max_body_bytes: int) -> BatchService:
    """The batches of this process's replica, where they are not refused. Raises ManifestError where they
    cannot be kept in their folder."""
    section = http.batches
    folder = _session_folder() if section.folder is None else Path(section.folder)
    store = batch_store(section, folder)
    return BatchService(store, BatchLimits(section.max_file_bytes, section.concurrency), max_body_bytes)


def _session_folder() -> Path:
    """In the folder of the Ray session on this node: a replica that takes over finds what the last one has left."""
    node: Any = ray._private.worker.global_worker.node
    return Path(node.get_session_dir_path()) / "isotherm-batches"
