"""Two keys with one prompt and the bundled model: what is cached for whom, and that it changes no token."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from local_client import TINY, LocalClient

from isotherm.cluster.api import behalf
from isotherm.cluster.api.access.caller import Caller
from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

BODY = {"model": "tiny", "prompt": [7 + i % 300 for i in range(200)], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def tokenizer():
    loaded = Tokenizer.load(TINY)
    yield loaded
    loaded.chat_template.close()


def answers(tokenizer, monkeypatch, shared):
    """(text, cached tokens) of the same request by two keys in turn, on an engine of their own."""
    callers = {name: Caller(name, tenant=name) for name in ("a", "b")}
    monkeypatch.setattr(behalf, "caller_of", lambda request: callers[request.headers["x-test-key"]])
    app = build_app(LocalClient(), tokenizer, "tiny", settings=AppSettings(shared_prefix_cache=shared))

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for key in ("a", "b", "a", "b"):
                said = (await client.post("/v1/completions", json=BODY, headers={"x-test-key": key})).json()
                yield said["choices"][0]["text"], said["usage"]["prompt_tokens_details"]["cached_tokens"]

    async def collected():
        return [one async for one in go()]

    return zip(*asyncio.run(collected()), strict=True)


def test_keys_share_no_prefix_unless_a_switch_says_so(tokenizer, monkeypatch):
    texts, cached = answers(tokenizer, monkeypatch, shared=False)
    assert cached == (0, 0, 192, 192) and len(set(texts)) == 1
    same, cached = answers(tokenizer, monkeypatch, shared=True)
    assert cached == (0, 192, 192, 192) and same == texts
