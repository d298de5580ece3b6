"""/tokenize and /detokenize: the same ids as a generation computes with, and back."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fake_engine import BOS, FakeEngine

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.settings import AppSettings

CHAT = {"messages": [{"role": "user", "content": "naïve 😀 hello"}]}


@pytest.fixture
def engine(tokenizer):
    return FakeEngine(tokenizer.vocab_size, max_model_len=200)


@pytest.fixture
def ask(engine, tokenizer):
    app = build_app(engine, tokenizer, "m", ["alias"], AppSettings(max_body_bytes=100_000))

    def call(path, **body):
        async def go():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                return await client.post(path, json=body)

        return asyncio.run(go())

    return call


@pytest.mark.parametrize("text", ["hello world", "日本語 café", "", " ", f"{BOS}hello"])
def test_a_text_has_the_ids_of_a_completions_prompt(ask, engine, tokenizer, text):
    answer = ask("/tokenize", model="alias", prompt=text).json()
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 200 and answer["token_strs"] is None
    if text:
        ask("/v1/completions", model="m", prompt=text, max_tokens=1)
        assert answer["tokens"] == list(engine.seen[-1].prompt)
    bare = ask("/tokenize", prompt=text, add_special_tokens=False).json()["tokens"]
    assert bare == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("more", [{}, {"chat_template_kwargs": {"thinking": True}}, {"model": "alias"}])
def test_a_chat_has_the_ids_of_a_chats_prompt(ask, engine, more):
    answer = ask("/tokenize", **CHAT, **more).json()
    whole = ask("/v1/chat/completions", **{"model": "m", **CHAT, **more}, max_tokens=1).json()
    assert answer["tokens"] == list(engine.seen[-1].prompt)
    assert answer["count"] == whole["usage"]["prompt_tokens"]


def test_token_strings_are_the_vocabularys(ask, tokenizer):
    answer = ask("/tokenize", prompt="hello world", return_token_strs=True).json()
    assert answer["token_strs"] == [tokenizer.token_string(id_) for id_ in answer["tokens"]]
    assert answer["token_strs"][0] == BOS and len(ask("/tokenize", **CHAT, return_token_strs=True).json()["token_strs"])


def test_what_is_too_long_for_the_model_is_counted_all_the_same(ask):
    assert ask("/tokenize", prompt="日" * 300).json()["count"] > 200
    long = {"messages": [{"role": "user", "content": "日" * 300}]}
    assert ask("/tokenize", **long).json()["count"] > 200
    assert ask("/v1/chat/completions", model="m", **long).status_code == 400


def test_back_to_text(ask):
    text = "日本語 café 😀 hello"
    tokens = ask("/tokenize", prompt=text).json()["tokens"]
    assert ask("/detokenize", model="m", tokens=tokens).json() == {"prompt": BOS + text}
    assert ask("/detokenize", tokens=[]).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "x" * 4000}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "nope"}, 404, "model"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {**CHAT, "model": "nope"}, 404, "model"),
        ("/tokenize", {**CHAT, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 4000}]}, 400, "messages"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [5, 10**6]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "model": "nope"}, 404, "model"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(ask, path, body, status, param):
    answer = ask(path, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), json.dumps(answer.json())
