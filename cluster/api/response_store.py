"""Responses that are kept, so that a later request can go on from them: in bounded memory, those longest unused leave
first."""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Protocol

from isotherm.cluster.api.replies import to_json
from isotherm.cluster.jsontypes import JSON

_SHARE = 4  # one key's responses may take this part of the memory


@dataclass(frozen=True)
class Kept:
    """A response, the items that it answers, and the response before it. JSON as text takes a known number of bytes."""

    response_id: str
    previous: str | None
    response_json: bytes
    input_json: bytes

    @classmethod
    def of(cls, response: JSON, items: list[JSON]) -> Kept:
        return cls(response["id"], response["previous_response_id"], to_json(response), to_json(items))

    @property
    def response(self) -> JSON:
        response: JSON = json.loads(self.response_json)
        return response

    @property
    def input_items(self) -> list[JSON]:
        items: list[JSON] = json.loads(self.input_json)
        return items

    @property
    def size(self) -> int:
        return len(self.response_json) + len(self.input_json)


class ResponseStore(Protocol):
    """Where responses are kept, each for the key (the owner) that asked for it. Calls may block."""

    def put(self, owner: str, kept: Kept) -> None: ...

    def get(self, owner: str, response_id: str) -> Kept | None: ...

    def delete(self, owner: str, response_id: str) -> bool:
        """Whether there was one."""


class MemoryResponseStore:
    """In this process. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()  # longest unused first
        self._sizes: Counter[str] = Counter()  # by owner
        self._lock = threading.Lock()

    def put(self, owner: str, kept: Kept) -> None:
        share = self._max_bytes // _SHARE
        if kept.size > share:
            return
        with self._lock:
            while self._sizes[owner] + kept.size > share:
                self._remove(next(key for key in self._kept if key[0] == owner))
            while self._sizes.total() + kept.size > self._max_bytes:
                self._remove(next(iter(self._kept)))
            self._kept[owner, kept.response_id] = kept
            self._sizes[owner] += kept.size

    def get(self, owner: str, response_id: str) -> Kept | None:
        with self._lock:
            if (kept := self._kept.get((owner, response_id))) is not None:
                self._kept.move_to_end((owner, response_id))
            return kept

    def delete(self, owner: str, response_id: str) -> bool:
        with self._lock:
            if (owner, response_id) not in self._kept:
                return False
            self._remove((owner, response_id))
            return True

    def _remove(self, key: tuple[str, str]) -> None:
        self._sizes[key[0]] -= self._kept.pop(key).size
        if not self._sizes[key[0]]:
            del self._sizes[key[0]]
