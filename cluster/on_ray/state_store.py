"""Where controllers keep their state: in Ray's own key-value store, which lives as long as the Ray cluster does, and
survives the loss of its head where Ray's is fault-tolerant."""

from __future__ import annotations

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

from isotherm.cluster.messages.membership import SupersededError
from isotherm.cluster.on_ray.controller_process import HANGS
from isotherm.cluster.on_ray.workers import NAMESPACE

_NAMESPACE = NAMESPACE.encode()


class StateStore:
    """One value per controller of a cluster, replaced as a whole; `generation` numbers them, from 0. An older one
    cannot change what a newer one reads. Calls take a millisecond and block; they raise what Ray raises when its head
    cannot be reached."""

    def __init__(self, cluster_id: str):
        self._prefix = f"controller/{cluster_id}/".encode()
        self.generation = -1

    def claim(self) -> int:
        """Become the newest generation, alone: of those who try at once each gets a number of its own."""
        while True:
            self.generation = self._newest() + 1
            if not _internal_kv_put(self._key(self.generation), b"", overwrite=False, namespace=_NAMESPACE):
                return self.generation

    def read(self) -> bytes | None:
        """What was written last, by this controller or the newest before it that wrote anything."""
        for generation in sorted(self._generations(), reverse=True):
            if generation <= self.generation and (
                state := _internal_kv_get(self._key(generation), namespace=_NAMESPACE)
            ):
                return state
        return None

    def check(self) -> None:
        """Raises SupersededError when a newer controller has been started."""
        if self._newest() > self.generation:
            raise SupersededError(f"controller {self.generation} is not the newest any more: {self._newest()} is")

    def write(self, state: bytes) -> None:
        """Raises SupersededError as `check`."""
        self.check()
        _internal_kv_put(self._key(self.generation), state, overwrite=True, namespace=_NAMESPACE)
        for generation in self._generations():
            if generation < self.generation:
                _internal_kv_del(self._key(generation), namespace=_NAMESPACE)

    def clear(self) -> None:
        for prefix in (self._prefix, HANGS.encode()):
            _internal_kv_del(prefix, del_by_prefix=True, namespace=_NAMESPACE)

    def _key(self, generation: int) -> bytes:
        return self._prefix + str(generation).encode()

    def _generations(self) -> list[int]:
        return [int(key.removeprefix(self._prefix)) for key in _internal_kv_list(self._prefix, namespace=_NAMESPACE)]

    def _newest(self) -> int:
        return max(self._generations(), default=-1)
