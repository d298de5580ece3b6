"""A program: passes Ethernet frames between two interfaces, each direction late by some seconds, and loses some of
them."""

from __future__ import annotations

import heapq
import itertools
import random
import select
import socket
import sys
import time

ETH_P_ALL = 3
SOL_PACKET, PACKET_VNET_HDR = 263, 15  # frames come with what the network card was to do to them: checksums, segments
PACKET_IGNORE_OUTGOING = 23
FRAME_BYTES = 1 << 17


def tap(interface: str) -> socket.socket:
    tapped = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    tapped.bind((interface, 0))
    tapped.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    tapped.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    return tapped


def relay(one: str, other: str, delay: float, loss: float) -> None:
    taps = tap(one), tap(other)
    chance, order = random.Random(11), itertools.count()
    late: list[tuple[float, int, bytes, socket.socket]] = []
    print("ready", flush=True)
    while True:
        pause = max(0.0, late[0][0] - time.monotonic()) if late else None
        for ready in select.select(taps, [], [], pause)[0]:
            frame = ready.recv(FRAME_BYTES)
            if chance.random() >= loss:
                heapq.heappush(late, (time.monotonic() + delay, next(order), frame, taps[ready is taps[0]]))
        while late and late[0][0] <= time.monotonic():
            _, _, frame, towards = heapq.heappop(late)
            towards.send(frame)


if __name__ == "__main__":
    relay(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
