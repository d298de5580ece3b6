"""Bodies that are nearly right never make an error of ours, and leave nothing behind. ISOTHERM_FUZZ_BODIES: how
many."""

from __future__ import annotations

import asyncio
import os

import httpx
import pytest
from fake_engine import FakeEngine, write_tokenizer
from mutated_bodies import VALID, mutated

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.batches.service import BatchLimits, BatchService
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("ISOTHERM_FUZZ_BODIES", 300))
CANARY = {"model": "m", "messages": [{"role": "user", "content": "canary"}], "max_tokens": 8, "temperature": 0}
JSON_TYPE = {"content-type": "application/json"}


@pytest.fixture
def served(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    engine = FakeEngine(tokenizer.vocab_size)
    batches = BatchService(Store(tmp_path / "batches", 1 << 20, 10_000), BatchLimits(), 100_000)
    settings = AppSettings(tool_format="hermes")
    yield build_app(engine, tokenizer, "m", settings=settings, batches=batches), engine
    tokenizer.chat_template.close()


@pytest.mark.timeout(3600)
def test_no_body_makes_an_error_of_ours(served):
    app, engine = served

    async def go():
        seen: dict[int, int] = {}
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def canary():
                return (await client.post("/v1/chat/completions", json=CANARY)).json()["choices"]

            before = await canary()
            for seed in range(COUNT):
                path, body = mutated(seed)
                answer = await client.post(path, content=body, headers=JSON_TYPE)
                assert answer.status_code < 500 and "server_error" not in answer.text, (seed, path, body, answer.text)
                if answer.status_code >= 400:
                    assert answer.json()["error"]["message"], (seed, path, body)
                seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert await canary() == before and not engine.open
        return seen

    seen = asyncio.run(go())
    print(f"\n{COUNT} mutated bodies: {dict(sorted(seen.items()))}")
    assert seen[200] > COUNT / 20 and seen[400] > COUNT / 3, "bodies on both sides of the border"


def test_what_they_are_made_of_is_valid(served):
    app, _ = served

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for path, body in VALID:
                answer = await client.post(path, json=body)
                assert answer.status_code == 200 or answer.json()["error"]["code"] == "not_found", answer.text

    asyncio.run(go())
