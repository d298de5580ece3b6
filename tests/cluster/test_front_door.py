"""The front door of a checkpoint whose chat template is broken."""

from __future__ import annotations

import asyncio
import logging
import threading

import httpx
from fake_engine import FakeEngine, write_tokenizer

from isotherm.cluster.front_door import front_door
from isotherm.cluster.manifest import parse_manifest


def test_a_broken_template_is_said_at_the_start_and_completions_go_on(tmp_path, caplog):
    write_tokenizer(tmp_path, chat_template="{% if %}")
    (tmp_path / "config.json").write_text("{}")
    manifest = parse_manifest({"model": str(tmp_path), "served_name": "m", "generation_config": "none"})
    before = set(threading.enumerate())
    with caplog.at_level(logging.WARNING):
        app = front_door(manifest, tmp_path, FakeEngine(300))
        for thread in set(threading.enumerate()) - before:
            thread.join(60)
    (said,) = [r.getMessage() for r in caplog.records if r.name == "isotherm.cluster.front_door"]
    assert said.startswith("chats: the model's chat template does not compile: ")

    async def go() -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
            return (
                await client.post("/v1/chat/completions", json=chat),
                await client.post("/v1/completions", json={"model": "m", "prompt": "hi", "max_tokens": 2}),
            )

    chat, completion = asyncio.run(go())
    error = chat.json()["error"]
    assert (chat.status_code, error["type"]) == (500, "server_error") and "does not compile" in error["message"]
    assert completion.status_code == 200 and completion.json()["usage"]["completion_tokens"] == 2
