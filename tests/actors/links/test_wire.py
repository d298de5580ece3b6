"""Messages over a process group: whole, and a peer that dies in the middle of one is missed at once."""

from __future__ import annotations

import threading
import time
import uuid
from datetime import timedelta

import pytest
import torch
from link_peers import HUGE, die_while_receiving, kill_at_first_byte, open_wire, process, send_hugely

from isotherm.actors.links.process_group import ProcessGroupLink, open_process_group
from isotherm.actors.links.protocol import LinkError
from isotherm.actors.links.rendezvous import Rendezvous
from isotherm.actors.links.wire import LARGE, Wire

pytestmark = pytest.mark.slow

HOST = "127.0.0.1"
PATIENCE = timedelta(seconds=20)


@pytest.fixture(scope="module")
def rendezvous() -> Rendezvous:
    return Rendezvous(HOST)


@pytest.mark.parametrize("nbytes", [0, 1, LARGE, LARGE + 1, 10 * LARGE])
def test_messages_arrive_whole_and_in_order(rendezvous: Rendezvous, nbytes: int):
    prefix = uuid.uuid4().hex
    wires: list[Wire] = []
    peer = threading.Thread(target=lambda: wires.append(open_wire(rendezvous.port, prefix, 1)))
    peer.start()
    mine = open_wire(rendezvous.port, prefix, 0)
    peer.join()
    (theirs,) = wires
    for number in range(3):
        body = torch.randint(256, (nbytes,), dtype=torch.uint8)
        mine.send(2, (number, nbytes), body if nbytes else None)
        parts: list[int] = []
        kind, fields, arrived = theirs.receive(PATIENCE, lambda parts=parts: parts.append(1))
        assert len(parts) == 1 + (nbytes > 0) + (nbytes > LARGE)
        assert (kind, fields[:2]) == (2, [number, nbytes]) and torch.equal(arrived, body)
        theirs.send(3, (number,), arrived)
        assert torch.equal(mine.receive(PATIENCE)[2], body)
        mine.flush(PATIENCE)


def test_a_peer_that_dies_while_it_sends(rendezvous: Rendezvous):
    prefix = uuid.uuid4().hex
    with process(send_hugely, rendezvous.port, prefix) as pid:
        wire = open_wire(rendezvous.port, prefix, 0)
        killed = kill_at_first_byte(wire, pid)
        with pytest.raises(LinkError):
            wire.receive(PATIENCE)
        assert time.perf_counter() - killed[0] < 5.0


def test_a_peer_that_dies_while_it_receives(rendezvous: Rendezvous):
    prefix = uuid.uuid4().hex
    with process(die_while_receiving, rendezvous.port, prefix):
        link = ProcessGroupLink(open_process_group(HOST, rendezvous.port, prefix, 0, HOST, 20.0), 20.0)
        link._wire.send(1, (7,), torch.ones(HUGE, dtype=torch.uint8))
        begin = time.perf_counter()
        with pytest.raises(LinkError):
            link.receive()
        assert time.perf_counter() - begin < 10.0
