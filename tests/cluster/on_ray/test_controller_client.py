"""What an ingress replica is told where Ray does not know, or cannot reach, whom it asks."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayError

from isotherm.cluster.messages.membership import WorkerGoneError
from isotherm.cluster.on_ray import controller_client
from isotherm.cluster.on_ray.controller_client import ControllerClient, RayShard

NOT_KNOWN = ValueError("Failed to look up actor with name 'attention-0'.\nIt was killed, or never named.")


@pytest.mark.parametrize("error", [NOT_KNOWN, RayError("the head is away"), RayActorError()])
def test_a_shard_that_cannot_be_found_is_gone(error: Exception, monkeypatch: pytest.MonkeyPatch):
    """Its streams go on elsewhere (cluster/routing/shard_client.py); any other error would be one of the request."""

    def find_worker(name: str) -> Any:
        raise error

    monkeypatch.setattr(controller_client, "find_worker", find_worker)
    with pytest.raises(WorkerGoneError) as caught:
        asyncio.run(ControllerClient().shard("attention-0"))
    assert str(caught.value) and "\n" not in str(caught.value)


def test_a_shard_is_looked_for_in_a_thread_and_its_errors_of_other_kinds_are_told(monkeypatch: pytest.MonkeyPatch):
    threads: list[threading.Thread] = []

    def find_worker(name: str) -> Any:
        threads.append(threading.current_thread())
        if name != "attention-0":
            raise TypeError("a bug")
        return SimpleNamespace()

    monkeypatch.setattr(controller_client, "find_worker", find_worker)
    assert isinstance(asyncio.run(ControllerClient().shard("attention-0")), RayShard)
    with pytest.raises(TypeError, match="a bug"):
        asyncio.run(ControllerClient().shard("attention-1"))
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("error", [ValueError("no such actor"), RayActorError()])
def test_a_controller_that_cannot_be_found_is_gone(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def find_controller() -> Any:
        raise error

    monkeypatch.setattr(controller_client, "find_controller", find_controller)
    with pytest.raises(WorkerGoneError, match="the controller cannot be reached: "):
        asyncio.run(ControllerClient().watch(-1))
