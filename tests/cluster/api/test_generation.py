"""What a reply says of itself: usage as it goes, and where the time went."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading

import httpx
import pytest

from isotherm.cluster.api import logprobs, prepare_completion, replies
from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.settings import AppSettings

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hello"},
}
paths = pytest.mark.parametrize("path", sorted(BODIES))


@pytest.fixture
def app(engine, tokenizer):
    return build_app(engine, tokenizer, "m", settings=AppSettings(silence_s=0.05, first_event_s=0.01))


def post(app, path, body):
    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            given = {"content": body} if isinstance(body, bytes) else {"json": body}
            return await client.post(path, **given)

    return asyncio.run(go())


@pytest.fixture
def ask(app):
    return lambda path, **fields: post(app, path, {"model": "m", "max_tokens": 4, **BODIES[path], **fields})


def chunks(answer):
    assert answer.status_code == 200, answer.text
    found = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert found[-1] == "[DONE]"
    return [json.loads(one) for one in found[:-1]]


@paths
def test_usage_has_every_detail(ask, path):
    used = ask(path).json()["usage"]
    assert used["prompt_tokens_details"] == {"cached_tokens": used["prompt_tokens"] // 2}
    assert used["completion_tokens_details"] == {
        "reasoning_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    }


@pytest.mark.parametrize("name", ["guided_regex", "regex", "gu\\u0069ded_regex"])
def test_the_grammar_of_a_small_completion_is_not_checked_on_the_event_loop(app, monkeypatch, name):
    inside: list[bool] = []

    def check(*args):
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            inside.append(True)
            return None
        inside.append(False)

    monkeypatch.setattr(prepare_completion, "output_constraint", check)
    for field, on_the_loop in ((f'"{name}": "a+"', False), ('"stop": "a"', True)):
        raw = f'{{"model": "m", "prompt": "hello", "max_tokens": 2, {field}}}'.encode()
        assert post(app, "/v1/completions", raw).status_code == 200
        assert inside.pop() is on_the_loop and not inside


@paths
@pytest.mark.parametrize("n", [1, 2])
def test_usage_in_every_chunk(ask, path, n):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *parts, last = chunks(ask(path, n=n, seed=7, stream=True, stream_options=options))
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts) and counts[-1] == 4 * n == last["usage"]["completion_tokens"]
    assert len(set(counts)) > 2 and last["choices"] == []
    assert all(part["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] for part in parts)
    alone = chunks(ask(path, n=n, seed=7, stream=True, stream_options={"continuous_usage_stats": True}))
    assert alone[-1]["choices"] and alone[-1]["usage"]["completion_tokens"] == 4 * n


@paths
def test_a_stream_that_asks_for_nothing_has_nothing_of_it(ask, path):
    for part in chunks(ask(path, stream=True)):
        assert "usage" not in part and "timings" not in part and part["choices"]


@paths
def test_a_whole_reply_says_where_its_time_went(ask, engine, path):
    engine.delay_s = 0.02
    timing = dict(
        re.fullmatch(r"(\w+);dur=([0-9.]+)", part).groups()  # type: ignore[union-attr]
        for part in ask(path).headers["x-isotherm-timing"].split(", ")
    )
    assert list(timing) == ["prepare", "queue", "prefill", "decode", "total"]
    milliseconds = {name: float(value) for name, value in timing.items()}
    assert milliseconds["prefill"] >= 19 and milliseconds["decode"] >= 57
    assert milliseconds["total"] == pytest.approx(sum(list(milliseconds.values())[:-1]), abs=1)


def test_scores_of_the_prompt_are_not_the_first_token(engine, ask, monkeypatch):
    generate = engine.generate

    async def late(request):
        """The tokens come a while after what scores the prompt."""
        scored = True
        async for delta in generate(request):
            if scored and delta.prompt is None:
                scored = False
                await asyncio.sleep(0.05)
            yield delta

    monkeypatch.setattr(engine, "generate", late)
    timing = ask("/v1/completions", prompt="hello there, world", prompt_logprobs=0).headers["x-isotherm-timing"]
    assert float(re.search(r"prefill;dur=([0-9.]+)", timing).group(1)) >= 49, timing  # type: ignore[union-attr]


@paths
def test_a_stream_says_so_in_its_last_chunk_where_it_is_asked(ask, path):
    *parts, last = chunks(ask(path, stream=True, stream_options={"include_timings": True}))
    assert last["choices"] == [] and last["usage"] is None and last["timings"]["total_ms"] > 0
    assert all("timings" not in part for part in parts)
    both = chunks(ask(path, stream=True, stream_options={"include_timings": True, "include_usage": True}))[-1]
    assert both["usage"]["completion_tokens"] == 4 and "decode_ms" in both["timings"]


@paths
def test_options_of_a_stream_that_cannot_be_honoured_are_refused(ask, path):
    answer = ask(path, stream=True, stream_options={"include_obfuscation": True})
    assert answer.json()["error"]["param"] == "stream_options.include_obfuscation"
    assert chunks(ask(path, stream=True, stream_options={"include_obfuscation": False}))


@pytest.mark.parametrize(
    ("path", "fields", "sign", "end"),
    [
        ("/v1/chat/completions", {**CHAT, "max_tokens": 1}, ": waiting\n\n", "data: [DONE]"),
        ("/v1/completions", {"prompt": "hello", "max_tokens": 1}, ": waiting\n\n", "data: [DONE]"),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 1}, ": waiting\n\n", "event: response.incomplete"),
        ("/v1/messages", {**CHAT, "max_tokens": 1}, "event: ping\n", "event: message_stop"),
    ],
)
def test_a_stream_that_waits_for_its_first_token_is_not_silent(engine, app, path, fields, sign, end):
    engine.delay_s = 0.3
    answer = post(app, path, {"model": "m", "stream": True, **fields})
    assert answer.status_code == 200 and sign in answer.text.partition(end)[0] and end in answer.text


@pytest.mark.parametrize(
    "asked",
    [{"prompt_logprobs": 20}, {"echo": True, "logprobs": 20}, {"echo": True, "logprobs": 20, "stream": True}],
)
def test_what_is_said_of_a_long_prompt_does_not_hold_up_the_event_loop(ask, monkeypatch, asked):
    on_loop = []

    def watched(of, name, cost):
        real = getattr(of, name)

        def call(*args):
            if threading.current_thread() is threading.main_thread():
                on_loop.append(cost(*args))
            return real(*args)

        monkeypatch.setattr(of, name, call)

    def said(length):
        on_loop.clear()
        answer = ask("/v1/completions", prompt=[2 + i % 200 for i in range(length)], **asked)
        assert answer.status_code == 200, answer.text
        return answer.text, sum(on_loop)

    watched(logprobs, "token_text", lambda *_: 1)
    watched(replies, "to_json", lambda value: len(str(value)) / 50)
    text, cost = said(400)
    assert cost < 400 and len(text) > 50_000
    assert said(20)[1] > 0, "a short one needs no thread"


@paths
def test_every_choice_is_bound_to_the_weights_that_the_reply_names(engine, ask, path):
    """Also where others are served by the time at which it is sent on."""
    engine.system_fingerprint = "isotherm-aaaaaaaaaaaa"
    reply = ask(path, n=3).json()
    assert reply["system_fingerprint"] == "isotherm-aaaaaaaaaaaa"
    assert [request.fingerprint for request in engine.seen] == ["isotherm-aaaaaaaaaaaa"] * 3
