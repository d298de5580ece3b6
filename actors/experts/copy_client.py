"""Copies packed experts from a peer, over one connection to its CopyServer. On an event loop, so that the caller can
set any limit."""

from __future__ import annotations

import asyncio
import json
import socket
import zlib

from isotherm.actors.experts.copy_wire import (
    ANSWER,
    CHECKSUM,
    CHUNK,
    GREETING,
    HELD,
    MAGIC,
    MOST_FORM,
    QUESTION,
    unix_address,
    widen,
)
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.messages.copies import CopyOffer
from isotherm.kernels.expert_bank import ExpertBank, ForeignBytesError, PackedExpert


class CopyError(IsothermError, RuntimeError):
    """A peer gives no copy of an expert; the checkpoint has it too."""


class PeerConnection:
    """Made over a connected socket, which it owns."""

    def __init__(self, connection: socket.socket):
        self._connection = connection

    @classmethod
    async def open(cls, offer: CopyOffer) -> PeerConnection:
        """Raises OSError."""
        address: bytes | tuple[str, int]
        where = offer.address
        if isinstance(where, str):
            family, address = socket.AF_UNIX, unix_address(where)
        else:
            family, address = socket.AF_INET6 if ":" in where[0] else socket.AF_INET, where
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            widen(connection)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, address)
            await loop.sock_sendall(connection, GREETING.pack(MAGIC, offer.key))
            return cls(connection)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    async def expert(self, bank: ExpertBank, layer: int, expert: int) -> PackedExpert:
        """Room of the bank's, filled. Raises CopyError or OSError, after which the connection is of no use."""
        await asyncio.get_running_loop().sock_sendall(self._connection, QUESTION.pack(layer, expert))
        status, size = ANSWER.unpack(await self._bytes(ANSWER.size))
        if status != HELD:
            raise CopyError(f"it does not hold layer {layer} expert {expert}")
        if not 0 < size <= MOST_FORM:
            raise CopyError(f"it announces a form of {size} bytes; there are at most {MOST_FORM}")
        form = await self._bytes(size)
        try:
            room = bank.room(json.loads(form))
        except (ForeignBytesError, ValueError) as error:
            raise CopyError(f"layer {layer} expert {expert}: {error}") from None
        checksum = zlib.crc32(form)
        for part in room.parts:
            checksum = await self._fill(part, checksum)
        (expected,) = CHECKSUM.unpack(await self._bytes(CHECKSUM.size))
        if checksum != expected:
            raise CopyError(f"layer {layer} expert {expert} has come with checksum {checksum:08x}, not {expected:08x}")
        return room

    async def _bytes(self, size: int) -> bytes:
        data = bytearray(size)
        await self._fill(memoryview(data), 0)
        return bytes(data)

    async def _fill(self, view: memoryview, checksum: int) -> int:
        """The checksum with the bytes that have come."""
        loop, done = asyncio.get_running_loop(), 0
        while done < len(view):
            got = await loop.sock_recv_into(self._connection, view[done : done + CHUNK])
            if not got:
                raise CopyError("it went away")
            checksum = zlib.crc32(view[done : done + got], checksum)
            done += got
        return checksum
