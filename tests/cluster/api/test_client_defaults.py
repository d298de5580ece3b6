"""What unmodified clients send and read by themselves: Anthropic's SDKs keep their conversations at the server where
they can, the AI SDK takes no null where a list may stand, and shows thoughts by their summaries alone; others look for
words in errors."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from local_client import TINY, LocalClient

from isotherm.cluster.api.app import build_app
from isotherm.cluster.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

ASKED = [{"role": "user", "content": "What is 3 + 4?"}]


@pytest.fixture(scope="module")
def app():
    tokenizer = Tokenizer.load(TINY)
    yield build_app(LocalClient(), tokenizer, "tiny")
    tokenizer.chat_template.close()


def post(app, route: str, **fields: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(route, json={"model": "tiny", "temperature": 0, **fields})

    return asyncio.run(go())


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(
    "thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}], ids=lambda t: t["type"]
)
def test_a_conversation_that_the_server_would_have_to_keep_is_refused_as_its_client_understands(app, thread):
    """It sends the whole of it then; taken without a word, every turn but the first came without those before."""
    answer = post(app, "/v1/messages", messages=ASKED, max_tokens=20, thread=thread)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"].startswith("thread is not supported")
    assert error["details"] == {"error_code": "thread_unsupported_request"}
    other = post(app, "/v1/messages", messages=ASKED, max_tokens=20, compaction={"type": "summarize"})
    assert other.status_code == 400 and "details" not in other.json()["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_block_has_no_null_where_a_list_may_stand(app, stream):
    answer = post(app, "/v1/messages", messages=ASKED, max_tokens=20, stream=stream)
    if stream:
        (block,) = (e["content_block"] for e in events(answer) if e["type"] == "content_block_start")
        assert block == {"type": "text", "text": ""}
    else:
        (block,) = answer.json()["content"]
        assert block.keys() == {"type", "text"} and "7" in block["text"]


@pytest.mark.parametrize("verbosity", ["low", "medium", "high"])
def test_hints_are_taken(app, verbosity):
    chat = post(app, "/v1/chat/completions", messages=ASKED, verbosity=verbosity)
    hints = {"text": {"verbosity": verbosity}, "prompt_cache_retention": "24h"}
    response = post(app, "/v1/responses", input=ASKED, **hints)
    assert chat.status_code == response.status_code == 200
    assert response.json()["text"]["verbosity"] == verbosity


@pytest.mark.parametrize("words", [9000, 600_000], ids=["tokens", "characters"])
def test_a_prompt_that_is_too_long_is_told_in_the_words_that_clients_know(app, words):
    """LangChain, litellm and strands look for them, shorten the conversation, and go on."""
    long = [{"role": "user", "content": "hello " * words}]
    chat = post(app, "/v1/chat/completions", messages=long).json()["error"]
    assert chat["code"] == "context_length_exceeded" and "this model's maximum context length" in chat["message"]
    said = post(app, "/v1/messages", messages=long, max_tokens=16).json()["error"]["message"]
    assert re.match(r"prompt is too long: \d+ (tokens|characters) > \d+ maximum ", said), said


def test_what_is_said_twice_in_two_forms_is_taken(app):
    """guidance sends vLLM's old form and its new one."""
    twice = {"guided_grammar": 'start: "ab"', "structured_outputs": {"grammar": 'start: "ab"'}}
    hints = {"guided_decoding_backend": "guidance", "max_tokens": 9}
    answer = post(app, "/v1/chat/completions", messages=ASKED, **twice, **hints)
    assert answer.json()["choices"][0]["message"]["content"] == "ab"
    twice["structured_outputs"] = {"grammar": 'start: "cd"'}
    assert post(app, "/v1/chat/completions", messages=ASKED, **twice).status_code == 400


@pytest.mark.parametrize("summary", ["auto", "detailed", None])
def test_a_summary_that_is_asked_for_is_the_thought(app, summary):
    asked = {"input": ASKED, "reasoning": {"effort": "low", "summary": summary}, "store": False}
    whole = post(app, "/v1/responses", **asked).json()
    thought = next(item for item in whole["output"] if item["type"] == "reasoning")
    (content,) = thought["content"]
    told = [{"type": "summary_text", "text": content["text"]}] if summary else []
    assert content["text"] and thought["summary"] == told
    sent = events(post(app, "/v1/responses", **asked, stream=True))
    assert [e["sequence_number"] for e in sent] == list(range(len(sent)))
    mine = [e for e in sent if e["type"].startswith("response.reasoning_summary")]
    assert "".join(e["delta"] for e in mine if e["type"].endswith("text.delta")) == (content["text"] if summary else "")
    kinds = [e["type"].removeprefix("response.reasoning_summary_") for e in mine if not e["type"].endswith("delta")]
    assert kinds == (["part.added", "text.done", "part.done"] if summary else [])
    assert all((e["summary_index"], e["item_id"]) == (0, sent[2]["item"]["id"]) for e in mine)
