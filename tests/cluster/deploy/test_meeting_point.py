"""The store for new links is opened once, and only when a kind of link needs it."""

from __future__ import annotations

import asyncio
import socket

import pytest
import ray

from isotherm.actors.links.registry import CARRIERS
from isotherm.cluster.control.link_choice import WITHOUT_STORE
from isotherm.cluster.deploy import meeting_point
from isotherm.cluster.deploy.meeting_point import MeetingPoint


def test_links_of_all_kinds_that_need_one_meet_at_one_store(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    point = MeetingPoint()

    async def addresses() -> list[tuple[str, int]]:
        return await asyncio.gather(*(point.address(kind) for kind in CARRIERS if kind not in WITHOUT_STORE))

    found = asyncio.run(addresses())
    assert len(found) == 2 and len(set(found)) == 1
    socket.create_connection(found[0], timeout=5).close()


def test_links_in_shared_memory_need_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meeting_point, "_open", pytest.fail)
    assert asyncio.run(MeetingPoint().address("shared-memory")) == ("", 0)
