"""Handing out experts: to whoever was given leave, as they are, and whatever a visitor does."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from copying import PAIRS, TAG, checkpoint, empty_worker, held_bytes, holder
from native_there import require_native
from waiting import until

from isotherm.actors.experts import copy_server
from isotherm.actors.experts.copy_client import CopyError, PeerConnection
from isotherm.actors.experts.copy_server import CopyServer
from isotherm.actors.experts.copy_wire import GREETING, MAGIC, QUESTION, unix_address
from isotherm.actors.experts.expert_loads import ExpertLoads
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.messages.copies import CopyOffer, CopySource

require_native(ring=True)

HOSTS = [None, "127.0.0.1"]


@pytest.fixture
def serve() -> Iterator[Callable[[str | None], CopyServer]]:
    made: list[CopyServer] = []

    def start(host: str | None = None) -> CopyServer:
        made.append(CopyServer(holder(), TAG, host))
        return made[-1]

    yield start
    for server in made:
        server.close()
        assert not server._thread.is_alive()


def greeted(offer: CopyOffer, key: bytes | None = None) -> socket.socket:
    """A visitor that does what it likes."""
    assert isinstance(offer.address, str)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(unix_address(offer.address))
    connection.sendall(GREETING.pack(MAGIC, key or offer.key))
    connection.settimeout(5)
    return connection


@pytest.mark.parametrize("host", HOSTS)
def test_copies_have_the_bits_of_what_is_read(serve, host: str | None):
    loads = ExpertLoads(empty_worker(), "peer")
    with WeightReader(checkpoint()) as reader:
        loads.load(reader, PAIRS, [CopySource(serve(host).offer("expert-1"), PAIRS)], TAG)
        assert reader.bytes_read == 0
    assert held_bytes(loads.worker) == held_bytes(holder())
    assert loads.told()["peer"]["experts"] == len(PAIRS)


def test_what_is_not_held_is_said(serve):
    async def ask(pair: tuple[int, int]) -> None:
        connection = await PeerConnection.open(serve().offer("expert-1"))
        try:
            await connection.expert(empty_worker().bank, *pair)
        finally:
            connection.close()

    for pair in (1, 1), (-1, 0), (0, -1), (1000, 0), (1, 1 << 20):
        with pytest.raises(CopyError, match=f"does not hold layer {pair[0]} expert {pair[1]}"):
            asyncio.run(ask(pair))


def test_a_key_lets_one_in_once_and_not_for_ever(serve, monkeypatch: pytest.MonkeyPatch, caplog):
    caplog.set_level(logging.WARNING)
    server = serve()
    offer = server.offer("expert-1")
    question = QUESTION.pack(*PAIRS[0])
    with greeted(offer, b"0" * 16) as stranger, greeted(offer) as one, greeted(offer) as again:
        assert stranger.recv(1) == b"" and again.recv(1) == b""
        one.sendall(question)
        assert one.recv(1) != b""
    monkeypatch.setattr(copy_server, "KEY_SECONDS", -1.0)
    with greeted(server.offer("expert-1")) as late:
        assert late.recv(1) == b""
    assert caplog.messages == ["somebody without leave wanted to copy experts"] * 3


def test_a_key_that_is_given_out_while_another_is_looked_up_is_kept(serve, monkeypatch: pytest.MonkeyPatch):
    server, offers = serve(), []
    first = server.offer("expert-1")
    compare = copy_server.hmac.compare_digest

    def offer_meanwhile(*keys: bytes) -> bool:
        if not offers:
            asking = threading.Thread(target=lambda: offers.append(server.offer("expert-2")))
            asking.start()
            asking.join(0.2)
        return compare(*keys)

    monkeypatch.setattr(copy_server.hmac, "compare_digest", offer_meanwhile)
    with greeted(first) as one:
        one.sendall(QUESTION.pack(*PAIRS[0]))
        assert one.recv(1) != b""
    until(lambda: len(offers) == 1)
    with greeted(offers[0]) as two:
        two.sendall(QUESTION.pack(*PAIRS[0]))
        assert two.recv(1) != b""


def test_a_visitor_that_does_not_read_keeps_others_waiting_for_a_bounded_time(serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copy_server, "PATIENCE", 0.3)
    server = serve()
    with greeted(server.offer("expert-1")) as stopped, greeted(server.offer("expert-1")) as silent:
        stopped.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stopped.sendall(QUESTION.pack(*PAIRS[0]) * 100)
        silent.sendall(QUESTION.pack(*PAIRS[0])[:3])
        loads, begin = ExpertLoads(empty_worker(), "peer"), time.monotonic()
        with WeightReader(checkpoint()) as reader:
            loads.load(reader, PAIRS, [CopySource(server.offer("expert-1"), PAIRS)], TAG)
        assert loads.told()["peer"]["experts"] == len(PAIRS) and time.monotonic() - begin < 10


def test_its_thread_gives_way(serve):
    thread = serve()._thread
    deadline = time.monotonic() + 10
    while os.getpriority(os.PRIO_PROCESS, thread.native_id) != copy_server.NICE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == copy_server.NICE
    assert os.getpriority(os.PRIO_PROCESS, 0) < copy_server.NICE or os.nice(0) == copy_server.NICE
