"""A toy kind of link, made as a further one would be: pickled messages over a TCP socket. It is this file, and a line
in each of two tables (tests/actors/links/test_registry.py)."""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import PrefixStore, TCPStore

from isotherm.actors.links.protocol import (
    Dispatch,
    ExpertNotHeldError,
    GroupFailedError,
    Link,
    LinkEnd,
    LinkError,
    Loops,
)
from isotherm.cluster.control.link_choice import LinkRule
from isotherm.cluster.messages.workers import Meeting

KIND = "socket"
LENGTH = struct.Struct("<q")
RULE = LinkRule(KIND, KIND, "a test wants it", lambda shard, group: None)


class _Connection:
    """Objects over a socket, which is closed where it fails."""

    def __init__(self, peer: socket.socket):
        self._peer = peer

    def put(self, message: Any) -> None:
        data = pickle.dumps(message)
        try:
            self._peer.sendall(LENGTH.pack(len(data)) + data)
        except OSError as error:
            self.close()
            raise LinkError(str(error)) from None

    def get(self) -> Any:
        return pickle.loads(self._read(LENGTH.unpack(self._read(LENGTH.size))[0]))

    def _read(self, nbytes: int) -> bytes:
        parts = []
        while nbytes:
            try:
                part = self._peer.recv(nbytes)
            except OSError as error:
                self.close()
                raise LinkError(str(error)) from None
            if not part:
                self.close()
                raise LinkError("the peer is gone")
            parts.append(part)
            nbytes -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        self._peer.close()


class SocketLink:
    """The shard's end."""

    kind = KIND

    def __init__(self, peer: socket.socket):
        self._connection = _Connection(peer)

    def send(self, message: Dispatch) -> None:
        self._connection.put(message)

    def receive(self, progress: Callable[[], None] = lambda: None) -> Tensor:
        answer: Tensor | Exception = self._connection.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def in_step(self, inside: bool) -> None:
        pass

    def close(self) -> None:
        with suppress(LinkError):
            self._connection.put(None)
        self._connection.close()


class SocketServerLink:
    """The group's end."""

    kind = KIND

    def __init__(self, peer: socket.socket):
        self._connection, self._sequence = _Connection(peer), 0

    def receive(self) -> tuple[int, Dispatch] | None:
        message = self._connection.get()
        self._sequence += 1
        if message is None:  # the shard said that it lets go
            self._connection.close()
            return None
        return self._sequence, message

    def reply(self, sequence: int, output_PD: Tensor) -> None:
        self._connection.put(output_PD)

    def refuse(self, sequence: int, error: Exception) -> None:
        known = isinstance(error, ExpertNotHeldError)
        self._connection.put(error if known else GroupFailedError(f"the group failed: {error}"))


class Sockets:
    """The carrier. The group says its port in the cluster's key-value store."""

    kind = KIND

    def unavailable_reason(self) -> str | None:
        return None

    def open(self, meeting: Meeting, end: LinkEnd, most_rows: int) -> Link:
        host, port = pickle.loads(_store(meeting).get("address"))
        peer = socket.create_connection((host, port), meeting.timeout)
        peer.settimeout(end.timeout)
        return SocketLink(peer)

    def accept(self, meeting: Meeting, end: LinkEnd, shard: str, loops: Loops) -> None:
        with socket.create_server((end.host, 0)) as listener:
            listener.settimeout(meeting.timeout)
            _store(meeting).set("address", pickle.dumps(listener.getsockname()))
            peer, _ = listener.accept()
        peer.settimeout(None)
        loops.python.attach(shard, SocketServerLink(peer))


def _store(meeting: Meeting) -> PrefixStore:
    store = TCPStore(
        meeting.store_host, meeting.store_port, is_master=False, timeout=timedelta(seconds=meeting.timeout)
    )
    return PrefixStore(meeting.prefix, store)
