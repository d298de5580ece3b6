"""Expert workers of the bundled model that copy from each other, and peers that do so badly."""

from __future__ import annotations

import asyncio
import json
import socket
import zlib
from collections.abc import Awaitable, Callable
from functools import cache

import torch

from isotherm.actors.experts.copy_client import PeerConnection
from isotherm.actors.experts.copy_wire import ANSWER, CHECKSUM, HELD, QUESTION
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.messages.copies import CopyOffer, CopySource
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.kernels.native.backend import NativeKernels

PAIRS = tuple((layer, expert) for layer in (1, 2) for expert in (0, 3, 5))
TAG = "tiles"


@cache
def checkpoint() -> Checkpoint:
    return Checkpoint.open(bundled_model())


@cache
def kernels() -> NativeKernels:
    return NativeKernels(torch.bfloat16, 1)


def empty_worker(slots: int = 16) -> ExpertWorker:
    return ExpertWorker(checkpoint().config, kernels(), slots)


@cache
def holder() -> ExpertWorker:
    """Holds PAIRS, as read from the checkpoint."""
    worker = empty_worker()
    with WeightReader(checkpoint()) as reader:
        worker.load(reader, PAIRS)
    return worker


def held_bytes(worker: ExpertWorker) -> dict[tuple[int, int], list[bytes]]:
    out = {}
    for pair in worker.pairs():
        packed = worker.packed(*pair)
        assert packed is not None
        out[pair] = [bytes(part) for part in packed.parts]
    return out


def source(group: str = "expert-1", pairs=PAIRS, tag: str = TAG, address="nowhere") -> CopySource:
    return CopySource(CopyOffer(group, tag, b"k" * 16, address), tuple(pairs))


def answer(pair: tuple[int, int]) -> bytes:
    """What a sound peer says."""
    packed = holder().packed(*pair)
    assert packed is not None
    form = json.dumps(packed.form).encode()
    body = form + b"".join(bytes(part) for part in packed.parts)
    return ANSWER.pack(HELD, len(form)) + body + CHECKSUM.pack(zlib.crc32(body))


class FakePeers:
    """Stands for PeerConnection.open: each connection is served by `serve`, on the loop of the caller."""

    def __init__(self, serve: Callable[[FakePeer], Awaitable[None]]):
        self._serve = serve
        self.asked: list[tuple[int, int]] = []
        self.opened: list[str] = []
        self._tasks: list[asyncio.Future[None]] = []

    async def open(self, offer: CopyOffer) -> PeerConnection:
        self.opened.append(offer.group)
        own, other = socket.socketpair()
        own.setblocking(False)
        other.setblocking(False)
        self._tasks.append(asyncio.ensure_future(self._run(other)))
        return PeerConnection(own)

    async def _run(self, connection: socket.socket) -> None:
        with connection:
            await self._serve(FakePeer(connection, self.asked))


class FakePeer:
    def __init__(self, connection: socket.socket, asked: list[tuple[int, int]]):
        self._connection, self._asked = connection, asked

    async def question(self) -> tuple[int, int]:
        data = b""
        while len(data) < QUESTION.size:
            more = await asyncio.get_running_loop().sock_recv(self._connection, QUESTION.size - len(data))
            if not more:
                raise asyncio.CancelledError
            data += more
        pair = QUESTION.unpack(data)
        self._asked.append(pair)
        return pair

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._connection, data)
