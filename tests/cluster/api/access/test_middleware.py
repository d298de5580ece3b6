"""What a key lets its caller do, over the whole front door with an engine without a model."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_keys import key_store, make_key
from fake_engine import FakeEngine
from fake_observer import FakeObserver
from starlette.datastructures import Headers

from isotherm.cluster.api.access.key_store import KeyStore
from isotherm.cluster.api.access.presented import presented
from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.batches.in_process import ask as ask_in_process
from isotherm.cluster.api.batches.service import BatchLimits, BatchService
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.observed import Observer
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.observe.request_figures import REQUESTS, RequestFigures

CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 4,
    "temperature": 0,
}


class Front:
    """A front door with two keys: ann's, with limits, and bob's, without."""

    def __init__(
        self, engine: FakeEngine, tokenizer: Any, folder: Path, observer: Observer | None = None, **ann: Any
    ) -> None:
        self.ann, first = make_key("ann", **ann)
        self.bob, second = make_key("bob")
        self.keys: KeyStore = key_store(folder / "keys.json", [first, second])
        batches = BatchService(Store(folder, 1 << 20, 10_000), BatchLimits(), 100_000)
        settings = AppSettings(keys=self.keys)
        self.app = build_app(engine, tokenizer, "m", ["alias"], settings, batches=batches, observer=observer)

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    def ask(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            async with self.client() as client:
                headers = {"authorization": f"Bearer {self.ann if key is None else key}"}
                return await client.request(method, path, headers=headers, **options)

        return asyncio.run(go())

    def chat(self, key: str | None = None, **fields: Any) -> httpx.Response:
        return self.ask("POST", "/v1/chat/completions", key, json={**CHAT, **fields})


def test_the_caller_is_whose_request_it_is(engine, tokenizer, tmp_path):
    front = Front(engine, tokenizer, tmp_path, priority=3)
    assert front.chat(user="somebody").status_code == 200 and front.chat(front.bob, priority=9).status_code == 200
    assert [(request.key, request.priority) for request in engine.seen] == [("ann", 3), ("bob", 9)]


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"authorization": "Bearer k"}, "k"),
        ({"authorization": "bearer  k "}, "k"),
        ({"x-api-key": "k"}, "k"),
        ({"authorization": "Bearer k", "x-api-key": "other"}, "k"),
        ({"authorization": "Basic xyz", "x-api-key": "k"}, "k"),
        ({"authorization": "Bearer "}, None),
        ({"authorization": "k"}, None),
        ({}, None),
    ],
)
def test_where_a_key_may_stand(headers: dict[str, str], key: str | None):
    assert presented(Headers(headers)) == key


def test_refusals_are_in_the_form_of_the_route(engine, tokenizer, tmp_path):
    front = Front(engine, tokenizer, tmp_path, requests_per_minute=1)
    openai = front.chat("wrong")
    assert openai.status_code == 401 and openai.json()["error"]["code"] == "invalid_api_key"
    body = {"model": "m", "max_tokens": 4, "messages": CHAT["messages"]}
    anthropic = front.ask("POST", "/v1/messages", "wrong", json=body)
    assert anthropic.json()["type"] == "error" and anthropic.json()["error"]["type"] == "authentication_error"
    assert front.ask("POST", "/v1/messages", json=body).status_code == 200
    limited = front.ask("POST", "/v1/messages", json=body)
    assert (limited.status_code, limited.json()["error"]["type"]) == (429, "rate_limit_error")


def test_requests_of_a_minute(engine, tokenizer, tmp_path):
    front = Front(engine, tokenizer, tmp_path, requests_per_minute=2)
    first = front.chat()
    assert first.status_code == 200 and first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1" and first.headers["x-ratelimit-reset-requests"]
    assert front.ask("POST", "/tokenize", json={"prompt": "x"}).status_code == 200
    refused = front.chat()
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert "requests_per_minute, 2" in error["message"] and 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert front.ask("GET", "/v1/models").status_code == 200, "looking is free"
    other = front.chat(front.bob)
    assert other.status_code == 200 and not any(name.startswith("x-ratelimit") for name in other.headers)


def test_what_a_limit_refuses_is_told_like_every_other_refusal(engine, tokenizer, tmp_path):
    """A client that was refused all the time could be seen in no metric, no log and not among the requests."""
    observer = FakeObserver()
    front = Front(engine, tokenizer, tmp_path, observer, requests_per_minute=1)
    assert [front.chat().status_code for _ in range(3)] == [200, 429, 429]
    assert front.ask("GET", "/v1/models").status_code == 200
    told = [(r.key, r.route, r.status, r.error) for r in observer.book.recent()]
    route = "/v1/chat/completions"
    assert told == [("ann", route, 429, "rate_limit_exceeded")] * 2 + [("ann", route, 200, "")]
    assert observer.book.open_count == 0


def test_a_limited_client_makes_no_series_up(engine, tokenizer, tmp_path):
    """Each path that it asked for was a label for ever, and a line of its own making in the log."""
    figures = RequestFigures()
    observer = FakeObserver([figures.take])
    front = Front(engine, tokenizer, tmp_path, observer, requests_per_minute=1)
    assert front.chat().status_code == 200
    batch = f"/v1/batches/{uuid.uuid4()}/cancel"
    for path in (*(f"/x%0Ay/{uuid.uuid4()}" for _ in range(20)), batch):
        assert front.ask("POST", path).status_code == 429
    (requests,) = [family for family in figures.read() if family.metric is REQUESTS]
    assert requests.values == {
        ("ann", "/v1/chat/completions"): 1, ("ann", "other"): 20, ("ann", "/v1/batches/{batch_id}/cancel"): 1,
    }  # fmt: skip


def test_tokens_of_a_minute(engine, tokenizer, tmp_path):
    front = Front(engine, tokenizer, tmp_path, tokens_per_minute=70)
    first = front.chat(max_tokens=30)
    used = first.json()["usage"]["total_tokens"]
    left = int(first.headers["x-ratelimit-remaining-tokens"])
    assert 30 < used < 50 and 70 - used <= left <= 72 - used
    assert front.chat(max_tokens=30).status_code == 200, "a prompt that fits is let in, whatever comes of it"
    refused = front.chat()
    assert refused.status_code == 429 and "tokens_per_minute" in refused.text and len(engine.seen) == 2


def test_streams_at_once(engine, tokenizer, tmp_path):
    front = Front(engine, tokenizer, tmp_path, streams=2)
    engine.delay_s = 0.02

    async def go() -> list[int]:
        async with front.client() as client:

            def post(**fields: Any) -> Any:
                headers = {"x-api-key": front.ann}
                body = {**CHAT, "max_tokens": 5, **fields}
                return client.post("/v1/chat/completions", json=body, headers=headers)

            open_ = [asyncio.ensure_future(post(stream=bool(i))) for i in range(2)]
            while len(engine.open) < 2:
                await asyncio.sleep(0.005)
            third = await post()
            assert third.headers["retry-after"] == "1" and "streams, 2" in third.text
            done = [answer.status_code for answer in await asyncio.gather(*open_)]
            headers, prompts = {"x-api-key": front.ann}, {"model": "m", "prompt": ["a", "b", "c"], "max_tokens": 2}
            many = await client.post("/v1/completions", json=prompts, headers=headers)
            assert "3 streams" in many.text and many.json()["error"]["code"] == "key_limit_exceeded"
            two, three = await post(n=2), await post(n=3)
            return [third.status_code, *done, two.status_code, three.status_code, many.status_code]

    assert asyncio.run(go()) == [429, 200, 200, 200, 400, 400]
    key = front.keys.named("ann")
    assert key is not None and key.allowance.streams == 0


def test_fields_that_ask_for_too_much_are_named_as_the_route_names_them(engine, tokenizer, tmp_path):
    front = Front(engine, tokenizer, tmp_path, n=1, max_tokens=6, models=["alias"])
    assert front.chat().json()["error"]["param"] == "model"
    assert [m["id"] for m in front.ask("GET", "/v1/models").json()["data"]] == ["alias"]
    assert front.ask("GET", "/v1/models/m").status_code == 404
    for fields, param in (({"n": 2}, "n"), ({"max_tokens": 7}, "max_tokens"), ({"priority": -1}, "priority")):
        refused = front.chat(model="alias", **fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    body = {"model": "alias", "input": "hi", "max_output_tokens": 17}
    refused = front.ask("POST", "/v1/responses", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_output_tokens")
    assert not engine.seen
    # Where nothing is said, and with Anthropic's clients, who have to say something, it is cut.
    assert front.chat(model="alias", max_tokens=None).json()["usage"]["completion_tokens"] == 6
    body = {"model": "alias", "max_tokens": 1000, "messages": CHAT["messages"]}
    assert front.ask("POST", "/v1/messages", json=body).json()["stop_reason"] == "max_tokens"
    assert [request.params.max_tokens for request in engine.seen] == [6, 6]
    assert front.ask("POST", "/tokenize", json={"prompt": "x"}).status_code == 200


def test_a_key_for_other_models_alone(engine, tokenizer, tmp_path):
    front = Front(engine, tokenizer, tmp_path, models=["elsewhere"])
    for method, path, body in (("POST", "/v1/chat/completions", CHAT), ("POST", "/tokenize", {"prompt": "x"})):
        refused = front.ask(method, path, json=body)
        assert refused.status_code == 403 and "none of the models" in refused.text


def test_kept_responses_are_their_keys_own(engine, tokenizer, tmp_path):
    front = Front(engine, tokenizer, tmp_path)
    kept = front.ask("POST", "/v1/responses", json={"model": "m", "input": "hi", "max_output_tokens": 16}).json()["id"]
    assert front.ask("GET", f"/v1/responses/{kept}").status_code == 200
    assert front.ask("GET", f"/v1/responses/{kept}", front.bob).status_code == 404
    assert front.ask("DELETE", f"/v1/responses/{kept}", front.bob).status_code == 404
    body = {"model": "m", "input": "and?", "previous_response_id": kept, "max_output_tokens": 16}
    assert front.ask("POST", "/v1/responses", front.bob, json=body).status_code == 404
    assert front.ask("POST", "/v1/responses", json=body).status_code == 200


def test_files_are_their_keys_own(engine, tokenizer, tmp_path):
    front = Front(engine, tokenizer, tmp_path)
    row = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT})
    made = front.ask("POST", "/v1/files", files={"file": ("a.jsonl", row.encode())}, data={"purpose": "batch"})
    file = made.json()["id"]
    assert "owner" not in made.json() and "owner" not in front.ask("GET", f"/v1/files/{file}").json()
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert front.ask(method, f"/v1/files/{file}{path}", front.bob).status_code == 404
    assert front.ask("GET", "/v1/files", front.bob).json()["data"] == []
    assert [one["id"] for one in front.ask("GET", "/v1/files").json()["data"]] == [file]
    body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert front.ask("POST", "/v1/batches", front.bob, json=body).status_code == 404
    batch = front.ask("POST", "/v1/batches", json=body).json()
    assert "owner" not in batch
    assert front.ask("GET", f"/v1/batches/{batch['id']}", front.bob).status_code == 404
    assert front.ask("POST", f"/v1/batches/{batch['id']}/cancel", front.bob).status_code == 404
    assert front.ask("GET", "/v1/batches", front.bob).json()["data"] == []
    assert [one["id"] for one in front.ask("GET", "/v1/batches").json()["data"]] == [batch["id"]]
    assert front.ask("DELETE", f"/v1/files/{file}").status_code in (200, 409)


def test_rows_of_a_batch_are_asked_as_the_key_that_made_it(engine, tokenizer, tmp_path):
    front = Front(engine, tokenizer, tmp_path, requests_per_minute=2)

    async def go() -> list[int]:
        front.keys.begin()
        path = "/v1/chat/completions"
        answers = [await ask_in_process(front.app, 7, "ann", path, CHAT) for _ in range(3)]
        answers += [await ask_in_process(front.app, 7, name, path, CHAT) for name in ("gone", "")]
        await front.keys.close()
        assert "'gone', which made this batch, is no more" in answers[-2].body["error"]["message"]
        assert "made while the server asked for no API key" in answers[-1].body["error"]["message"]
        return [answer.status for answer in answers]

    assert asyncio.run(go()) == [200, 200, 429, 401, 401]
    assert [(request.key, request.priority) for request in engine.seen] == [("ann", 7)] * 2


def test_without_keys_nobody_is_asked_and_nothing_is_counted(engine, tokenizer):
    app = build_app(engine, tokenizer, "m")

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer any"})

    answer = asyncio.run(go())
    assert answer.status_code == 200 and not any(name.startswith("x-ratelimit") for name in answer.headers)
    assert engine.seen[0].key == ""
