"""Where commands ask that are not told where."""

from __future__ import annotations

import os
from typing import Any

import pytest

from isotherm.cluster.cli import served_url as module
from isotherm.cluster.cli.served_url import running_url, served_url
from isotherm.cluster.client.calls import DEFAULT_URL

HERE, ASKED = "http://127.0.0.1:9123", "http://127.0.0.1:9999"


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Addresses of Rays that were asked where they serve."""
    asked: list[Any] = []

    def cluster_url(address: str | None) -> str:
        asked.append(address)
        return ASKED

    monkeypatch.setattr("isotherm.cluster.on_ray.session.cluster_url", cluster_url)
    monkeypatch.setattr(module, "prepare_attach", lambda address: address or os.environ.get("RAY_ADDRESS"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return asked


def runs(monkeypatch: pytest.MonkeyPatch, url: str | None) -> None:
    monkeypatch.setattr(module, "local_url", lambda: url)


def test_what_is_told_goes_first(ray: list[Any], monkeypatch: pytest.MonkeyPatch):
    runs(monkeypatch, HERE)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:7")
    assert served_url("http://other:1") == "http://other:1" and ray == []


def test_the_cluster_that_runs_here_is_found_without_ray(ray: list[Any], monkeypatch: pytest.MonkeyPatch):
    runs(monkeypatch, HERE)
    assert served_url(None) == running_url(None) == HERE and ray == []


def test_the_cluster_of_an_address_says_where_it_listens(ray: list[Any], monkeypatch: pytest.MonkeyPatch):
    runs(monkeypatch, HERE)
    assert running_url("127.0.0.1:6") == ASKED
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:7")
    assert served_url(None) == running_url(None) == ASKED
    assert ray == ["127.0.0.1:6", "127.0.0.1:7", "127.0.0.1:7"]


def test_where_none_runs_it_is_the_usual_port_or_a_ray_that_is_found(ray: list[Any], monkeypatch: pytest.MonkeyPatch):
    runs(monkeypatch, None)
    assert served_url(None) == DEFAULT_URL and ray == []
    assert running_url(None) == ASKED and ray == [None]
