"""What of a manifest reaches the front door."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fake_engine import FakeEngine

from isotherm.cluster.front_door import front_door
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.model.path import bundled_model


def answers(manifest, model, client=("10.0.0.1", 5)):
    engine = FakeEngine(512)
    app = front_door(parse_manifest(manifest), model, engine)

    async def go():
        transport = httpx.ASGITransport(app, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            listed = (await http.get("/v1/models")).json()["data"][0]
            return listed, (await http.get("/status")).status_code

    return asyncio.run(go())


@pytest.fixture
def with_defaults(tmp_path):
    for file in bundled_model().iterdir():
        if file.suffix in (".json", ".jinja"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    return tmp_path


def test_names_defaults_and_access_are_the_manifests(with_defaults):
    manifest = {"model": str(with_defaults), "served_name": "mine"}
    listed, status = answers(manifest, with_defaults)
    assert listed["id"] == "mine" and listed["default_sampling"]["temperature"] == 0.6 and status == 403
    listed, status = answers({**manifest, "generation_config": "none", "http": {"admin": "open"}}, with_defaults)
    assert listed["default_sampling"]["temperature"] == 1.0 and status == 200


def test_a_manifests_time_for_a_request_is_kept(with_defaults):
    engine = FakeEngine(2000, delay_s=30.0)
    app = front_door(parse_manifest({"model": "m", "http": {"request_timeout": 0.05}}), with_defaults, engine)

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            return await http.post("/v1/completions", json={"model": "m", "prompt": "hello"})

    answer = asyncio.run(go())
    assert answer.status_code == 408 and "time of 0.05 s" in answer.json()["error"]["message"]
