from __future__ import annotations

import asyncio
import gzip
import json

import httpx
import openai
import pytest
from fake_engine import FakeEngine, http_server
from waiting import until

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.settings import AppSettings

MODEL = "org/model"
NO_DETAILS = {"reasoning_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def app(engine, tokenizer):
    return build_app(engine, tokenizer, MODEL, ["alias"], AppSettings(max_body_bytes=100_000))


def call(app, method, path, **kwargs):
    async def go():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(go())


def chat(app, **fields):
    return call(
        app,
        "POST",
        "/v1/chat/completions",
        json={"model": MODEL, "messages": USER, "max_tokens": 8, "temperature": 0, **fields},
    )


def complete(app, **fields):
    return call(
        app,
        "POST",
        "/v1/completions",
        json={"model": MODEL, "prompt": "hello", "max_tokens": 8, "temperature": 0, **fields},
    )


def events(response):
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_small_endpoints(app, engine):
    models = call(app, "GET", "/v1/models").json()
    assert [model["id"] for model in models["data"]] == [MODEL, "alias"]
    assert call(app, "GET", f"/v1/models/{MODEL}").json()["root"] == MODEL
    assert call(app, "GET", "/v1/models/nope").json()["error"]["code"] == "model_not_found"
    assert call(app, "GET", "/health").status_code == 200
    assert call(app, "GET", "/ready").json() == {"status": "ready"}
    engine.reason = "loading: 2 of 3 workers"
    ready = call(app, "GET", "/ready")
    assert (ready.status_code, ready.json()["reason"], ready.headers["retry-after"]) == (503, engine.reason, "1")
    engine.reason, engine.holds_up = None, "attention-0 has waited for expert-1 for 1.5 s"
    ready = call(app, "GET", "/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, engine.holds_up)
    assert call(app, "GET", "/health").status_code == 200
    assert call(app, "GET", "/version").json()["version"]
    assert call(app, "GET", "/status").json()["placement_version"] == 1


def test_unknown_paths_and_methods_in_openai_form(app):
    for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405)):
        response = call(app, method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "//v1/models", "/v1//models//"])
def test_slashes_too_many_mean_nothing(app, path):
    answer = call(app, "GET", "http://localhost" + path)  # else httpx takes the first part for a host
    assert answer.status_code == 200 and [model["id"] for model in answer.json()["data"]] == [MODEL, "alias"]
    assert call(app, "GET", f"/v1/models/{MODEL}/").json()["id"] == MODEL
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 2}
    assert call(app, "POST", "/v1/completions/", json=body).status_code == 200


def test_methods(app):
    post, get = {"POST"}, {"GET", "HEAD"}
    ask = "/v1/completions"
    for method, path, allow in (("GET", ask, post), ("PATCH", "/v1/models", get), ("HEAD", ask, post)):
        answer = call(app, method, path)
        assert answer.status_code == 405 and set(answer.headers["allow"].split(", ")) == allow
    head = call(app, "HEAD", "/v1/models")
    assert (head.status_code, head.headers["content-type"]) == (200, "application/json")
    options = call(app, "OPTIONS", "/v1/completions")
    assert (options.status_code, options.headers["allow"], options.content) == (204, "POST", b"")
    assert call(app, "OPTIONS", "/nope").status_code == 404


def test_no_header_stands_twice(app):
    others = (call(app, "GET", "/nope"), call(app, "OPTIONS", "/v1/completions"))
    for answer in (chat(app), chat(app, stream=True), *others):
        names = [name.lower() for name, _ in answer.headers.raw]
        assert len(names) == len(set(names)), names


def test_coded_bodies(app, engine):
    body = json.dumps({"model": MODEL, "prompt": "hello", "max_tokens": 8, "temperature": 0}).encode()
    headers = {"content-type": "application/json; charset=utf-8", "content-encoding": "gzip"}
    coded = call(app, "POST", "/v1/completions", content=gzip.compress(b"\xef\xbb\xbf" + body), headers=headers)
    assert coded.json()["choices"] == complete(app).json()["choices"]
    answer = call(app, "POST", "/v1/completions", content=body, headers={**headers, "content-encoding": "br"})
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip, deflate, zstd, identity")


def test_a_stream_that_waits_has_its_status_line_and_then_an_error_event(engine, tokenizer):
    engine.delay_s, engine.fail_after = 0.2, 0
    settings = AppSettings(first_event_s=0.02, silence_s=0.05)
    answer = complete(build_app(engine, tokenizer, MODEL, settings=settings), stream=True)
    assert answer.status_code == 200
    parts = answer.text.split("\n\n")
    assert parts[0] == ": waiting" and "the forward pass failed" in parts[-2] and "[DONE]" not in answer.text
    assert complete(build_app(engine, tokenizer, MODEL), stream=False).status_code == 500


def test_request_id(app):
    assert call(app, "GET", "/health", headers={"x-request-id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
    for bad in ("a" * 129, "a b", 'x"y'):
        given = call(app, "GET", "/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert given != bad and len(given) == 32
    assert chat(app).headers["x-request-id"] and chat(app, stream=True).headers["x-request-id"]


def test_chat_whole_equals_streamed(app, engine, tokenizer):
    whole = chat(app, n=2, seed=3, temperature=1, stream=False).json()
    assert whole["object"] == "chat.completion" and whole["id"].startswith("chatcmpl-") and whole["system_fingerprint"]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    prompt = engine.seen[0].prompt
    assert whole["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 16,
        "total_tokens": len(prompt) + 16,
        "prompt_tokens_details": {"cached_tokens": len(prompt) // 2},
        "completion_tokens_details": NO_DETAILS,
    }
    *chunks, done = events(chat(app, n=2, seed=3, temperature=1, stream=True, stream_options={"include_usage": True}))
    assert done == "data: [DONE]"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for i in range(2):
        mine = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == i]
        assert mine[0]["delta"]["role"] == "assistant"
        assert mine[-1]["delta"] == {} and mine[-1]["finish_reason"] == "length" == whole["choices"][i]["finish_reason"]
        assert "".join(one["delta"].get("content", "") for one in mine) == whole["choices"][i]["message"]["content"]
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]
    assert chat(app, seed=3, temperature=1).json()["choices"][0] == whole["choices"][0]
    assert not engine.open


def test_completions_prompts_echo_and_alias(app, tokenizer):
    body = complete(app, model="alias", prompt=["hello", tokenizer.decode([300])], echo=True).json()
    assert body["model"] == "alias" and body["object"] == "text_completion"
    assert (
        body["choices"][0]["text"].startswith("hello")
        and body["choices"][0]["text"] == "hello" + complete(app).json()["choices"][0]["text"]
    )
    *chunks, _ = events(complete(app, echo=True, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == body["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_stop_string_ends_the_engines_stream(app, engine, tokenizer):
    engine.script = tokenizer.encode("one two three four ", add_special_tokens=False)
    engine.per_delta = 3
    body = complete(app, stop=["wo t"], max_tokens=200, logprobs=0).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("one t", "stop")
    assert body["usage"]["completion_tokens"] == len(body["choices"][0]["logprobs"]["tokens"]) < len(engine.script)
    assert (engine.closed_early, engine.open) == (1, set())
    *chunks, done = events(chat(app, stop=["wo t"], max_tokens=200, stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one t"
    assert done == "data: [DONE]" and engine.closed_early == 2


def test_end_of_sequence_is_not_text(app, engine, tokenizer):
    engine.script = [*tokenizer.encode("yes", add_special_tokens=False), 1]
    body = chat(app, max_tokens=50).json()
    assert (body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]) == ("yes", "stop")
    assert body["usage"]["completion_tokens"] == len(engine.script)
    assert chat(app, ignore_eos=True, max_tokens=50).json()["choices"][0]["finish_reason"] == "length"
    visible = chat(app, ignore_eos=True, skip_special_tokens=False, max_tokens=len(engine.script)).json()["choices"][0][
        "message"
    ]["content"]
    assert visible == tokenizer.decode(engine.script, skip_special_tokens=False)


def test_logprobs(app, engine):
    engine.per_delta = 2
    content = chat(app, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 8 and content[0]["logprob"] == -0.5
    assert [entry["logprob"] for entry in content[0]["top_logprobs"]] == [-0.5, -1.5]
    assert bytes(content[0]["bytes"]).decode("utf-8", "replace") == content[0]["token"]
    *chunks, _ = events(chat(app, logprobs=True, stream=True))
    assert (
        sum(len(chunk["choices"][0]["logprobs"]["content"]) for chunk in chunks if chunk["choices"][0]["logprobs"]) == 8
    )
    logprobs = complete(app, logprobs=1).json()["choices"][0]["logprobs"]
    assert {len(values) for values in logprobs.values()} == {8}
    assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])
    assert chat(app).json()["choices"][0]["logprobs"] is None


def test_a_thought_that_the_template_opens_is_split_from_the_content(app, engine, tokenizer):
    engine.script = [*tokenizer.encode("hmm</think>\n\n7", add_special_tokens=False), 1]
    engine.per_delta = 2
    thinking = {"chat_template_kwargs": {"thinking": True}, "max_tokens": 50}
    body = chat(app, **thinking).json()
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("hmm", "hmm", "\n\n7")
    used = body["usage"]
    assert 0 < used["completion_tokens_details"]["reasoning_tokens"] < used["completion_tokens"] == len(engine.script)
    *chunks, _ = events(chat(app, **thinking, stream=True))
    parts = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(part.get("reasoning_content", "") for part in parts) == "hmm"
    assert "".join(part.get("content", "") for part in parts) == "\n\n7"
    together = chat(app, **thinking, separate_reasoning=False).json()
    assert together["choices"][0]["message"] == {"role": "assistant", "content": "hmm</think>\n\n7", "refusal": None}
    assert together["usage"]["completion_tokens_details"] == NO_DETAILS
    # Without a thought there is nothing to split: </think> is text like any other.
    assert chat(app, max_tokens=50).json()["choices"][0]["message"] == together["choices"][0]["message"]
    assert complete(app, prompt="<think>", max_tokens=50).json()["choices"][0]["text"] == "hmm</think>\n\n7"


def test_engine_refuses_or_fails(app, engine):
    engine.unavailable = "no shard can take it"
    for stream in (False, True):
        response = chat(app, stream=stream)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert "no shard" in response.json()["error"]["message"]
    engine.unavailable, engine.fail_after = "", 0
    assert [chat(app, stream=stream).status_code for stream in (False, True)] == [500, 500]
    engine.fail_after = 3
    assert chat(app).json()["error"]["message"] == "the forward pass failed"
    *chunks, last = events(chat(app, stream=True))
    assert last["error"]["message"] == "the forward pass failed" and "data: [DONE]" not in chunks
    assert chat(app, n=3).status_code == 500 and not engine.open


def test_more_than_there_is_room_for_is_refused_before_it_costs_anything(engine, tokenizer):
    engine.places, engine.delay_s = 2, 0.05
    app = build_app(engine, tokenizer, MODEL)

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            body = {"model": MODEL, "prompt": "hello", "max_tokens": 4}
            bodies = [{**body, "stream": i % 2 > 0} for i in range(6)]
            answers = await asyncio.gather(*(client.post("/v1/completions", json=one) for one in bodies))
            whole = await client.post("/v1/completions", json={**body, "n": 2})  # all places are free again
            return answers, whole, await client.post("/v1/completions", json={**body, "n": 3})

    answers, whole, never = asyncio.run(go())
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "overloaded"
    assert whole.status_code == 200 and len(engine.seen) == 4
    assert (never.status_code, never.json()["error"]["param"]) == (400, "n")


def test_places_are_given_back_however_a_request_ends(engine, tokenizer):
    engine.places = 1
    app = build_app(engine, tokenizer, MODEL, settings=AppSettings(first_event_s=0.01))
    for spoil in ({"max_tokens": -1}, {"stream": True, "prompt": ""}, {}, {"stream": True}):
        complete(app, **spoil)
    engine.fail_after = 2
    assert complete(app).status_code == 500 and "forward pass" in complete(app, stream=True).text
    engine.fail_after, engine.delay_s = 0, 0.05
    assert "forward pass" in complete(app, stream=True).text
    engine.fail_after, engine.delay_s, engine.unavailable = None, 0.0, "loading"
    assert [complete(app, stream=stream).status_code for stream in (False, True)] == [503, 503]
    engine.unavailable = ""
    assert complete(app).status_code == 200


def test_a_shard_that_refuses_is_a_429(app, engine):
    engine.full = "256 requests are running or waiting here, and 256 may"
    for stream in (False, True):
        answer = chat(app, stream=stream)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert engine.full in answer.json()["error"]["message"]


def test_unexpected_exception_is_a_500_that_says_nothing(app, engine, monkeypatch):
    monkeypatch.setattr(engine, "token", lambda *_: 1 / 0)
    response = chat(app)
    assert response.status_code == 500 and "division" not in response.text
    assert response.headers["x-request-id"] and response.json()["error"]["code"] == "internal_error"


def test_body_limits_and_types(app):
    path = "/v1/completions"
    big = call(app, "POST", path, content=b"x" * 100_001, headers={"content-type": "application/json"})
    assert (big.status_code, big.headers["connection"]) == (413, "close")

    async def endless():
        while True:
            yield b"x" * 10_000

    assert call(app, "POST", path, content=endless(), headers={"content-type": "application/json"}).status_code == 413
    wrong = call(app, "POST", path, content=b"{}", headers={"content-type": "text/plain"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (415, "content-type")


HUGE = 10**30
MALFORMED = [
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": None}, "messages"),
    ("chat", {"messages": "hi"}, "messages"),
    ("chat", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ("chat", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": "a " * 3000}]}, "messages"),
    ("chat", {"model": "nope"}, "model"),
    ("chat", {"model": None}, "model"),
    ("chat", {"max_tokens": -1}, "max_tokens"),
    ("chat", {"max_tokens": 0}, "max_tokens"),
    ("chat", {"max_tokens": HUGE}, "max_tokens"),
    ("chat", {"max_tokens": 1.5}, "max_tokens"),
    ("chat", {"max_tokens": 1_000_000}, "messages"),
    ("chat", {"temperature": float("nan")}, "temperature"),
    ("chat", {"temperature": float("inf")}, "temperature"),
    ("chat", {"temperature": True}, "temperature"),
    ("chat", {"temperature": "hot"}, "temperature"),
    ("chat", {"temperature": 2.1}, "temperature"),
    ("chat", {"top_p": -0.5}, "top_p"),
    ("chat", {"top_p": HUGE}, "top_p"),
    ("chat", {"n": 0}, "n"),
    ("chat", {"n": HUGE}, "n"),
    ("chat", {"n": True}, "n"),
    ("chat", {"seed": HUGE}, "seed"),
    ("chat", {"stop": [""]}, "stop[0]"),
    ("chat", {"stop": ["x" * 5000]}, "stop[0]"),
    ("chat", {"logprobs": 3}, "logprobs"),
    ("chat", {"top_logprobs": 3}, "top_logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat", {"logit_bias": {"5": 200}}, "logit_bias.5"),
    ("chat", {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ("chat", {"response_format": {"type": "grammar"}}, "response_format"),
    ("complete", {"guided_regex": "("}, "guided_regex"),
    ("chat", {"tool_choice": "required"}, "tool_choice"),
    ("chat", {"chat_template": "{{ 1 }}"}, "chat_template"),
    ("chat", {"chat_template_kwargs": 5}, "chat_template_kwargs"),
    ("chat", {"stream": "yes"}, "stream"),
    ("chat", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("complete", {"prompt": ""}, "prompt"),
    ("complete", {"prompt": []}, "prompt"),
    ("complete", {"prompt": [-1]}, "prompt[0]"),
    ("complete", {"prompt": [True]}, "prompt[0]"),
    ("complete", {"prompt": [HUGE]}, "prompt[0]"),
    ("complete", {"prompt": [100_000]}, "prompt[0]"),
    ("complete", {"prompt": ["a"] * 10_000}, "prompt"),
    ("complete", {"prompt": [[1], ["a"]]}, "prompt[1][0]"),
    ("complete", {"prompt": "a " * 2000}, "prompt"),
    ("complete", {"logprobs": 21}, "logprobs"),
    ("complete", {"best_of": 129}, "best_of"),
    ("complete", {"suffix": "end"}, "suffix"),
]


def test_malformed_requests_name_the_field_and_change_nothing(app, engine):
    canary = chat(app).json()["choices"]
    reached = len(engine.seen)
    for kind, fields, param in MALFORMED:
        base = {"messages": USER} if kind == "chat" else {"prompt": "hello"}
        path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
        content = json.dumps({"model": MODEL, **base, **fields}).encode()
        response = call(app, "POST", path, content=content, headers={"content-type": "application/json"})
        assert response.status_code == (404 if fields.get("model") == "nope" else 400), (fields, response.text)
        error = response.json()["error"]
        assert error["param"] == param and param.rsplit(".", 1)[-1].partition("[")[0] in error["message"], (
            fields,
            error,
        )
    for content in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 50_000, b"9" * 6000):
        response = call(app, "POST", "/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400 and "body" in response.json()["error"]["message"]
    assert len(engine.seen) == reached
    assert chat(app).json()["choices"] == canary


def test_clients_that_vanish(tokenizer):
    engine = FakeEngine(tokenizer.vocab_size, max_model_len=100_000, delay_s=0.01)
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 90_000}
    with http_server(build_app(engine, tokenizer, MODEL)) as url:
        # in mid-stream
        with (
            httpx.Client() as client,
            client.stream("POST", url + "/v1/completions", json={**body, "stream": True, "n": 3}) as response,
        ):
            parts = response.iter_bytes()  # httpx hangs up when this iterator is collected
            next(parts)
            assert len(engine.open) == 3
        until(lambda: not engine.open)
        # waiting for a whole reply, and for a first token that does not come
        for fields, delay in (({}, 0.01), ({"stream": True}, 60.0)):
            engine.delay_s = delay
            with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.5) as client:
                client.post(url + "/v1/completions", json={**body, **fields})
            until(lambda: not engine.open)
        assert engine.closed_early == 5
        assert httpx.get(url + "/health").status_code == 200


def test_openai_client(tokenizer):
    engine = FakeEngine(tokenizer.vocab_size)
    with (
        http_server(build_app(engine, tokenizer, MODEL)) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
        messages: list = USER
        whole = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=20, logprobs=True, top_logprobs=1
        )
        assert whole.usage is not None and whole.usage.completion_tokens == 20
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=messages,
                temperature=0,
                max_tokens=20,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert (
            "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            == whole.choices[0].message.content
        )
        assert chunks[-1].usage == whole.usage
        text = client.completions.create(model=MODEL, prompt="hello", temperature=0, max_tokens=20)
        parts = client.completions.create(model=MODEL, prompt="hello", temperature=0, max_tokens=20, stream=True)
        assert "".join(part.choices[0].text for part in parts) == text.choices[0].text
        with pytest.raises(openai.BadRequestError) as info:
            client.chat.completions.create(model=MODEL, messages=messages, temperature=3)
        assert info.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nope", messages=messages)
        engine.fail_after = 3
        with pytest.raises(openai.APIError, match="forward pass"):
            list(client.chat.completions.create(model=MODEL, messages=messages, stream=True))
        engine.unavailable = "busy"
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model=MODEL, messages=messages)


def test_a_model_says_what_sampling_it_takes_for_granted(engine, tokenizer):
    app = build_app(engine, tokenizer, MODEL, settings=AppSettings(defaults={"temperature": 0.6, "top_k": 40}))
    (listed,) = call(app, "GET", "/v1/models").json()["data"]
    assert listed["default_sampling"] == {"temperature": 0.6, "top_p": 1.0, "top_k": 40}
