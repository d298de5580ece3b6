"""What bodies may ask of sampling, over HTTP: many choices, the best of them, echoed and scored prompts, token ids."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from fake_engine import BOS, EOS, http_server

from isotherm.cluster.api.app import build_app

MODEL = "m"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def app(engine, tokenizer):
    return build_app(engine, tokenizer, MODEL)


def post(app, path, **fields):
    async def go():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json={"model": MODEL, "max_tokens": 4, "seed": 1, **fields})

    answer = asyncio.run(go())
    assert answer.status_code == 200, answer.text
    return answer


def complete(app, **fields):
    return post(app, "/v1/completions", **{"prompt": "hello", **fields})


def chat(app, **fields):
    return post(app, "/v1/chat/completions", **{"messages": USER, **fields})


def chunks(answer):
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def joined(answer):
    """Of each choice of a stream: its text and its logprobs."""
    texts, logprobs = {}, {}
    for chunk in chunks(answer):
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            for key, values in (choice["logprobs"] or {}).items():
                logprobs.setdefault(choice["index"], {}).setdefault(key, []).extend(values)
    return texts, logprobs


def test_128_choices_of_one_prompt(app, engine):
    body = chat(app, n=128, temperature=1).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(128))
    assert len({choice["message"]["content"] for choice in body["choices"]}) > 100
    assert body["usage"]["completion_tokens"] == 128 * 4
    assert body["usage"]["prompt_tokens"] == len(engine.seen[0].prompt)
    assert len({request.family for request in engine.seen}) == 1


def test_the_best_of_several_are_those_with_the_likeliest_tokens(app, engine, monkeypatch):
    """The fake engine's tokens are all alike; here a choice's are as likely as its place says."""

    def place(request):
        return int(request.id.rsplit("-", 1)[1])

    monkeypatch.setattr(engine, "token", lambda request, index: 40 + place(request))
    monkeypatch.setattr(engine, "logprob", lambda request: -[3.0, 1.0, 2.0, 0.5, 9.0, 0.1][place(request)])
    prompts = {"prompt": ["hello", "world"], "best_of": 3}
    body = complete(app, **prompts, n=2).json()
    every = complete(app, **prompts, n=3, logprobs=0).json()["choices"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in every]
    assert [choice["text"] for choice in body["choices"]] == [texts[1], texts[2], texts[5], texts[3]]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 6 * 4
    told = complete(app, **prompts, n=1, logprobs=1).json()["choices"]
    assert [choice["logprobs"]["token_logprobs"] for choice in told] == [[-1.0] * 4, [-0.1] * 4]


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"max_tokens": 0}, {"max_tokens": 0, "n": 2}])
@pytest.mark.parametrize("prompt", ["hello there", f"{BOS}日本 x", [5, 6, 300, 1, 9], [0]])
def test_echo_with_logprobs(app, tokenizer, fields, prompt):
    """lm-eval's form: those of the prompt, the first one null, then those of the output, in streams too."""
    ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
    shown = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    asked = {"prompt": prompt, "echo": True, "logprobs": 2, **fields}
    answer = complete(app, **asked).json()
    plain = complete(app, prompt=prompt, logprobs=2, **{**fields, "max_tokens": 4}).json()
    for choice, unscored in zip(answer["choices"], plain["choices"], strict=True):
        told, output = choice["logprobs"], 0 if fields.get("max_tokens") == 0 else 4
        assert choice["text"] == shown + (unscored["text"] if output else "")
        assert choice["finish_reason"] == "length"
        assert {len(values) for values in told.values()} == {len(ids) + output}
        assert told["token_logprobs"][: len(ids)] == [None, *(-i / 10 for i in range(1, len(ids)))]
        assert told["token_logprobs"][len(ids) :] == unscored["logprobs"]["token_logprobs"][:output]
        assert told["top_logprobs"][0] is None
        for token, top in zip(told["tokens"][1 : len(ids)], told["top_logprobs"][1:], strict=False):
            assert token in top and 2 <= len(top) <= 3  # itself besides the two likeliest
        assert told["text_offset"][len(ids) :] == [
            len(shown) + at for at in unscored["logprobs"]["text_offset"][:output]
        ]
        assert told["text_offset"] == sorted(told["text_offset"])
    assert answer["usage"]["completion_tokens"] == output * fields.get("n", 1)
    texts, logprobs = joined(complete(app, **asked, stream=True))
    for i, choice in enumerate(answer["choices"]):
        assert (texts[i], logprobs[i]) == (choice["text"], choice["logprobs"])


def test_a_prompt_is_scored_in_vllms_form(app, tokenizer):
    body = complete(app, prompt=["hello", "lazy dog"], n=2, prompt_logprobs=1).json()
    for choice, text in zip(body["choices"], ["hello", "hello", "lazy dog", "lazy dog"], strict=True):
        ids = tokenizer.encode(text)
        first, *rest = choice["prompt_logprobs"]
        assert first is None and len(rest) == len(ids) - 1
        for i, (token, told) in enumerate(zip(ids[1:], rest, strict=True), 1):
            assert told[str(token)] == {"logprob": -i / 10, "rank": i, "decoded_token": tokenizer.decode([token])}
    body = chat(app, prompt_logprobs=0, n=2).json()
    assert body["prompt_logprobs"][0] is None and "prompt_logprobs" not in body["choices"][0]
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in chat(app).json()


def test_echo_and_vllms_form_together_have_each_their_count(app):
    (choice,) = complete(app, echo=True, logprobs=3, prompt_logprobs=1).json()["choices"]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 3 + 1 and len(choice["prompt_logprobs"][1]) <= 2


@pytest.mark.parametrize("per_delta", [1, 3])
def test_token_ids_are_told_where_they_are_asked_for(app, engine, tokenizer, per_delta):
    engine.script, engine.per_delta = [*tokenizer.encode("yes 日", add_special_tokens=False), 1], per_delta
    asked = {"return_token_ids": True, "max_tokens": 50, "n": 2}
    body = complete(app, **asked).json()
    assert [choice["token_ids"] for choice in body["choices"]] == [engine.script] * 2
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [tokenizer.encode("hello")] * 2
    talk = chat(app, **asked).json()
    assert [choice["token_ids"] for choice in talk["choices"]] == [engine.script] * 2
    assert len(talk["prompt_token_ids"]) == talk["usage"]["prompt_tokens"]
    for ask, whole in ((complete, body["choices"][0]), (chat, talk)):
        told = chunks(ask(app, **asked, stream=True))
        for index in range(2):
            mine = [chunk for chunk in told if chunk["choices"][0]["index"] == index]
            ids = [id_ for chunk in mine for id_ in chunk["choices"][0].get("token_ids", [])]
            assert ids == engine.script
            heads = [chunk if ask is chat else chunk["choices"][0] for chunk in mine]
            prompts = [head["prompt_token_ids"] for head in heads if "prompt_token_ids" in head]
            assert prompts == [whole["prompt_token_ids"]]
    assert "token_ids" not in complete(app).text and "token_ids" not in chat(app, stream=True).text


def test_what_stops_may_be_part_of_the_text(app, engine, tokenizer):
    engine.script = [*tokenizer.encode("one two 7", add_special_tokens=False), 1]
    asked = {"max_tokens": 50, "logprobs": 0, "include_stop_str_in_output": True}
    (choice,) = complete(app, **asked, stop="wo 7").json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one two 7", "stop")
    (choice,) = complete(app, **asked, skip_special_tokens=False).json()["choices"]
    assert choice["text"] == f"one two 7{EOS}" and len(choice["logprobs"]["tokens"]) == len(engine.script)
    last = engine.script[-2]
    (choice,) = complete(app, **asked, stop_token_ids=[last]).json()["choices"]
    assert choice["text"] == "one two 7"
    (choice,) = complete(app, max_tokens=50, stop_token_ids=[last]).json()["choices"]
    assert choice["text"] + tokenizer.decode([last]) == "one two 7"


@pytest.mark.parametrize("ask", [complete, chat])
def test_the_text_of_a_special_token_stops_where_it_is_not_shown(app, engine, tokenizer, ask):
    engine.script = [*tokenizer.encode("ab", add_special_tokens=False), 1, 5, 6]
    asked = {"stop": EOS, "ignore_eos": True, "max_tokens": 100}
    body = ask(app, **asked).json()
    (choice,) = body["choices"]
    assert (choice.get("text") or choice["message"]["content"], choice["finish_reason"]) == ("ab", "stop")
    assert body["usage"]["completion_tokens"] == engine.script.index(1) + 1


def test_openais_client_reads_it(engine, tokenizer):
    with http_server(build_app(engine, tokenizer, MODEL)) as base_url:
        client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
        made = client.completions.create(
            model=MODEL, prompt="hello", echo=True, logprobs=1, max_tokens=0, n=2, best_of=3, extra_body={"top_p": 0}
        )
        assert [choice.text for choice in made.choices] == ["hello", "hello"]
        assert made.choices[0].logprobs.token_logprobs[:2] == [None, -0.1]
