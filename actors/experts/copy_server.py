"""Hands out a group's packed experts to its peers, in a thread of its own that gives way to whoever computes: an expert
at a time, in small pieces."""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import zlib
from dataclasses import dataclass

from isotherm.actors.experts.copy_wire import (
    ANSWER,
    CHECKSUM,
    CHUNK,
    GREETING,
    HELD,
    MAGIC,
    NOT_HELD,
    QUESTION,
    unix_address,
    widen,
)
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.cluster.background import spawn_thread
from isotherm.cluster.errors import named_line
from isotherm.cluster.messages.copies import CopyOffer

log = logging.getLogger(__name__)
KEY_SECONDS = 60.0  # in which whoever was given a key must come
PATIENCE = 2.0  # seconds that a peer may take to read or to say a few bytes; others wait meanwhile
NICE = 19  # of the thread


@dataclass
class _Visitor:
    connection: socket.socket
    greeted: bool = False


class CopyServer:
    """`host`: where peers on other machines reach this one; None: those on this machine alone are served. `tag`: see
    CopyOffer. Of servers that share a `turn` one is busy at a time."""

    def __init__(self, worker: ExpertWorker, tag: str, host: str | None, turn: threading.Lock | None = None):
        self._worker, self._tag, self._turn = worker, tag, turn or threading.Lock()
        self._keys: dict[bytes, float] = {}  # that were given out → until when they open a connection
        self._keys_lock = threading.Lock()
        self._address: str | tuple[str, int]
        if host is None:
            self._address = f"isotherm/{secrets.token_hex(20)}"
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(unix_address(self._address))
            self._listener.listen()
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, 0), family=family)
            self._address = (host, self._listener.getsockname()[1])
        self._listener.settimeout(PATIENCE)
        self._end, self._ended = socket.socketpair()
        self._thread = spawn_thread("expert copies", self._serve, vital=False)

    def offer(self, group: str) -> CopyOffer:
        """Leave for one more connection to `group`, whose server this is."""
        now, key = time.monotonic(), secrets.token_bytes(16)
        with self._keys_lock:
            for known in [known for known, until in self._keys.items() if until <= now]:
                del self._keys[known]
            self._keys[key] = now + KEY_SECONDS
        return CopyOffer(group, self._tag, key, self._address)

    def close(self) -> None:
        self._end.close()
        self._thread.join()

    def _serve(self) -> None:
        if sys.platform == "linux":  # where threads have a priority of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        with self._listener, self._ended, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._ended, selectors.EVENT_READ)
            while True:
                for ready, _ in selector.select():
                    if ready.fileobj is self._ended:
                        for each in selector.get_map().values():
                            if isinstance(each.data, _Visitor):
                                each.data.connection.close()
                        return
                    if isinstance(ready.data, _Visitor):
                        if not self._attended(ready.data):
                            selector.unregister(ready.fileobj)
                            ready.data.connection.close()
                    elif (visitor := self._received()) is not None:
                        selector.register(visitor.connection, selectors.EVENT_READ, visitor)

    def _received(self) -> _Visitor | None:
        try:
            connection, _ = self._listener.accept()
            connection.settimeout(PATIENCE)
            widen(connection)
            return _Visitor(connection)
        except OSError as error:
            log.warning("a peer could not be let in to copy experts: %s", named_line(error))
            return None

    def _attended(self, visitor: _Visitor) -> bool:
        """Do what a visitor asks for; whether it may ask for more."""
        try:
            if not visitor.greeted:
                visitor.greeted = self._greeted(visitor.connection)
                return visitor.greeted
            question = _read(visitor.connection, QUESTION.size)
            if question:
                with self._turn:
                    self._answer(visitor.connection, *QUESTION.unpack(question))
            return bool(question)
        except (OSError, EOFError) as error:
            log.info("a peer that copied experts is gone: %s", named_line(error))
            return False

    def _greeted(self, connection: socket.socket) -> bool:
        greeting = _read(connection, GREETING.size)
        if not greeting:
            return False
        magic, key = GREETING.unpack(greeting)
        now = time.monotonic()
        with self._keys_lock:
            for known, until in self._keys.items():
                if magic == MAGIC and hmac.compare_digest(known, key) and until > now:
                    del self._keys[known]
                    return True
        log.warning("somebody without leave wanted to copy experts")
        return False

    def _answer(self, connection: socket.socket, layer: int, expert: int) -> None:
        packed = self._worker.packed(layer, expert)
        if packed is None:
            connection.sendall(ANSWER.pack(NOT_HELD, 0))
            return
        form = json.dumps(packed.form).encode()
        connection.sendall(ANSWER.pack(HELD, len(form)) + form)
        checksum = zlib.crc32(form)
        for part in packed.parts:
            for begin in range(0, len(part), CHUNK):
                chunk = part[begin : begin + CHUNK]
                checksum = zlib.crc32(chunk, checksum)
                connection.sendall(chunk)
        connection.sendall(CHECKSUM.pack(checksum))


def _read(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or none at the end. Raises EOFError for an end in between."""
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more and data:
            raise EOFError("it ended within a message")
        if not more:
            break
        data += more
    return data
