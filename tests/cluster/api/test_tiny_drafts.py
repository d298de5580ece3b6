"""What a request may ask for, with guessed tokens: the same reply as without, by the bundled model."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from local_client import TINY, LocalClient

from isotherm.cluster.api.app import build_app
from isotherm.cluster.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

STORY = "Tell me a story about a fox."
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def tokenizer():
    loaded = Tokenizer.load(TINY)
    yield loaded
    loaded.chat_template.close()


@pytest.fixture(scope="module")
def plain(tokenizer):
    return build_app(LocalClient(), tokenizer, "tiny")


@pytest.fixture(scope="module", params=["mtp", "ngram"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def guessing(tokenizer, kind):
    return build_app(LocalClient(speculation=kind), tokenizer, "tiny")


def chat(app: Any, content: str, **fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Choices, and the usage."""

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0,
                    "max_tokens": 160, "return_token_ids": True, **fields}  # fmt: skip
            return await client.post("/v1/chat/completions", json=body)

    answer = asyncio.run(go())
    assert answer.status_code == 200, answer.text
    said = answer.json()
    for choice in said["choices"]:
        for call in choice["message"].get("tool_calls") or ():
            del call["id"]
    return said["choices"], said["usage"]


def chunks(app: Any, content: str, **fields: Any) -> list[dict[str, Any]]:
    async def go() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0,
                    "stream": True, **fields}  # fmt: skip
            return (await client.post("/v1/chat/completions", json=body)).text

    events = [line.removeprefix("data: ") for line in asyncio.run(go()).splitlines() if line.startswith("data: {")]
    return [json.loads(event) for event in events]


def same(plain: Any, guessing: Any, content: str, **fields: Any) -> tuple[list[dict[str, Any]], int]:
    """The choices, which are the same with guesses and without, and how many tokens were guessed right."""
    expected, before = chat(plain, content, **fields)
    choices, used = chat(guessing, content, **fields)
    told, none = used.pop("completion_tokens_details"), before.pop("completion_tokens_details")
    del used["prompt_tokens_details"], before["prompt_tokens_details"]  # who asked before
    assert choices == expected and used == before
    assert none["accepted_prediction_tokens"] == none["rejected_prediction_tokens"] == 0
    assert told["accepted_prediction_tokens"] <= used["completion_tokens"]
    assert told["reasoning_tokens"] == none["reasoning_tokens"]
    return choices, told["accepted_prediction_tokens"]


def test_min_tokens(plain, guessing):
    """The end that the model would make is put off, among guesses too."""
    (short,), _ = chat(plain, "What is 3 + 4?")
    (choice,), right = same(plain, guessing, "What is 3 + 4?", min_tokens=60)
    assert len(short["token_ids"]) < 20 and len(choice["token_ids"]) >= 60 and right > 0


def test_a_tool_call(plain, guessing, kind):
    asked = {"tools": [TOOL], "tool_choice": "auto"}
    rights = []
    for city in ("Oslo", "Rome", "Paris"):
        (choice,), right = same(plain, guessing, f"What is the weather in {city}?", **asked)
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]) == {"city": city}
        rights.append(right)
    assert sum(rights) > 0 or kind == "ngram"  # which has too little to find in
    forced = {"tools": [TOOL], "tool_choice": "required", "temperature": 1, "seed": 3}
    (choice,), _ = same(plain, guessing, STORY, **forced)
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


def test_stop_strings(plain, guessing, kind):
    """One that a guess completes too: nothing of what was guessed behind it is told."""
    (whole,), _ = chat(plain, STORY)
    words = whole["message"]["content"].split()
    rights = []
    for word in dict.fromkeys(words[5:40:3]):
        (choice,), right = same(plain, guessing, STORY, stop=[word])
        assert choice["finish_reason"] == "stop" and word not in choice["message"]["content"]
        assert whole["message"]["content"].startswith(choice["message"]["content"])
        rights.append(right)
    assert sum(rights) > 0 or kind == "ngram"  # which has too little to find in


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_several_choices(plain, guessing, temperature):
    choices, right = same(plain, guessing, STORY, n=4, temperature=temperature, seed=5)
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3] and right > 0
    assert len({choice["message"]["content"] for choice in choices}) == (4 if temperature else 1)


def test_streams_of_several_choices(plain, guessing):
    """Chunks may have several tokens; what they come to is the same."""
    asked = {"n": 3, "max_tokens": 60, "temperature": 0.8, "seed": 2, "stream_options": {"include_usage": True}}
    texts = []
    for app in (plain, guessing):
        said: dict[int, str] = {}
        for chunk in chunks(app, STORY, **asked):
            for choice in chunk["choices"]:
                said[choice["index"]] = said.get(choice["index"], "") + (choice["delta"].get("content") or "")
        texts.append(said)
    assert texts[0] == texts[1] and len(texts[0]) == 3 and all(texts[0].values())


def test_a_request_that_wants_no_guesses_has_none(guessing):
    _, used = chat(guessing, STORY, speculation="off")
    told = used["completion_tokens_details"]
    assert told["accepted_prediction_tokens"] == told["rejected_prediction_tokens"] == 0
