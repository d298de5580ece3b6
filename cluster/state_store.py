"""Where a controller keeps its state: in Ray's own key-value store, which lives as long as the Ray cluster does, and survives the loss of its head
where Ray's is fault-tolerant."""

from __future__ import annotations

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from isotherm.cluster.ray_workers import NAMESPACE


class StateStore:
    """One value, replaced as a whole. Calls take a millisecond and block; they raise what Ray raises when its head cannot be reached."""

    def __init__(self, cluster_id: str):
        self._key = f"controller/{cluster_id}".encode()

    def read(self) -> bytes | None:
        return _internal_kv_get(self._key, namespace=NAMESPACE.encode())

    def write(self, state: bytes) -> None:
        _internal_kv_put(self._key, state, overwrite=True, namespace=NAMESPACE.encode())

    def clear(self) -> None:
        _internal_kv_del(self._key, namespace=NAMESPACE.encode())
