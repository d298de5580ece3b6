"""The bundled model, served by real processes: what the HTTP clients get, what the commands show, and that nothing is
left over."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import socket
import time
from pathlib import Path

import httpx
import openai
import pytest
from served import Served, generate
from streams import Workload

from isotherm.cluster.client import AsyncClient, Client

LAYOUTS = {"default": {}, "2x3": {"attention": {"shards": 2, "cpus": 0.2}, "experts": {"groups": 3, "cpus": 0.1}}}
SUM = [{"role": "user", "content": "What is 3 + 4?"}]


@pytest.fixture(scope="module", params=LAYOUTS)
def served(request, tmp_path_factory):
    cluster = Served(LAYOUTS[request.param], tmp_path_factory.mktemp("served"))
    with cluster:
        yield cluster
    assert cluster.left_over() == {"processes": [], "shared memory": []}


def test_answers_a_sum(served):
    with Client(served.url) as client:
        assert client.models() == ["tiny"]
        answer = client.chat(SUM, temperature=0)
        assert "7" in answer.text and answer.finish_reason == "stop"
        streamed = list(client.chat(SUM, temperature=0, stream=True))
        assert "".join(chunk.text for chunk in streamed) == answer.text


def test_events_of_streams_come_over_the_line_of_serves_proxy(served):
    """Else all of them would have gone Serve's way, whose cost is what the line is there for."""
    with Client(served.url) as client:
        assert "".join(chunk.text for chunk in client.chat(SUM, temperature=0, stream=True))
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    states = [fields[5] for fields in sockets if "@isotherm-line-" in fields[-1]]
    assert "03" in states, "none that listens has a connection"


def test_workers_are_processes_in_placement_groups_of_their_own(served):
    done = served.command("status", "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    workers = status["workers"]
    layout = json.loads(json.dumps(served.status()["workers"]))
    assert {w["id"] for w in workers} == {w["id"] for w in layout}
    roles = [w["role"] for w in workers]
    expected = (2, 3) if roles.count("attention") == 2 else (1, 2)
    assert (roles.count("attention"), roles.count("expert")) == expected
    assert len({w["pid"] for w in workers} | {status["controller"]["pid"]}) == len(workers) + 1
    assert len({w["placement_group"] for w in workers}) == len(workers)
    assert status["placement_version"] >= 1 and all(w["node"] and w["state"] == "loaded" for w in workers)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streams_are_what_each_gets_alone(served, temperature, record_property):
    work = Workload(64, [20 + 7 * i % 90 for i in range(64)], (temperature,))
    streams, expected = asyncio.run(work.serve(served.url)), work.alone()
    assert [s.error for s in streams if s.error] == []
    same = sum(s.text == e for s, e in zip(streams, expected, strict=True))
    record_property("identical", same / len(expected))
    print(f"identical to alone at temperature {temperature}: {same} of {len(expected)}")
    assert same == len(expected), [(s.text, e) for s, e in zip(streams, expected, strict=True) if s.text != e][:2]


def test_openai_client(served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    assert [m.id for m in client.models.list()] == ["tiny"]
    chat = client.chat.completions.create(model="tiny", messages=SUM, temperature=0, logprobs=True, top_logprobs=2)
    assert "7" in chat.choices[0].message.content
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    assert len(chat.choices[0].logprobs.content) >= 1
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=SUM, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == chat.usage.completion_tokens
    whole = client.completions.create(model="tiny", prompt="One, two, three,", max_tokens=12, temperature=0)
    parts = client.completions.create(
        model="tiny", prompt="One, two, three,", max_tokens=12, temperature=0, stream=True
    )
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=SUM)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="tiny", messages=SUM, max_tokens=-1)


def raw_exchange(port: int, *parts: bytes) -> bytes:
    """What comes back until the server closes the connection, or says no more for a while."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.1)
        got = b""
        while data := connection.recv(65536):
            got += data
        return got


def chat_head(version: str, length: int, *more: str) -> bytes:
    lines = [f"POST /v1/chat/completions HTTP/{version}", "Host: h", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def test_clients_that_offer_h2c_or_speak_http_1_0(served):
    """As Java's HttpClient sends it, whole and in two parts, and as old proxies do."""
    body = json.dumps({"model": "tiny", "messages": SUM, "temperature": 0}).encode()
    offer = ("Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
    for parts in ([chat_head("1.1", len(body), *offer) + body], [chat_head("1.1", len(body), *offer), body]):
        answer = raw_exchange(served.port, *parts)
        assert answer.startswith(b"HTTP/1.1 200 OK") and b"7" in answer and answer.lower().count(b"x-request-id:") == 1
    streamed = json.dumps({"model": "tiny", "messages": SUM, "temperature": 0, "stream": True}).encode()
    answer = raw_exchange(served.port, chat_head("1.0", len(streamed)) + streamed)
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower() and events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


def test_what_the_front_door_takes(served):
    body = json.dumps({"model": "tiny", "messages": SUM, "temperature": 0}).encode()
    with httpx.Client(base_url=served.url, timeout=60) as client:
        headers = {"content-type": "application/json", "content-encoding": "gzip", "x-request-id": "mine"}
        answer = client.post("/v1/chat/completions", content=gzip.compress(body), headers=headers)
        assert answer.status_code == 200 and answer.headers.get_list("x-request-id") == ["mine"]
        assert "x-isotherm-capacity" not in answer.headers
        for path in ("/v1/models/", "//v1/models"):
            assert client.get(served.url + path).json()["data"][0]["id"] == "tiny"
        assert client.get("/health").json() == {"status": "alive"} and client.get("/ready").status_code == 200
        # A whole reply is one gRPC message from replica to proxy, which by itself may have 4 MiB.
        long = client.post("/detokenize", json={"tokens": [3] * 400_000})
        assert long.status_code == 200 and len(long.content) > 4 << 20
        about_all = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
        about_all.request("OPTIONS", "*")
        reply = about_all.getresponse()
        assert reply.status == 204 and "POST" in reply.headers["allow"]
        about_all.close()
        for path in ("/admin/experts", "/status", "/metrics"):
            assert client.get(path).status_code == 200
            assert client.get(path, headers={"x-forwarded-for": "10.0.0.7"}).status_code == 403


def test_a_client_that_writes_all_before_it_reads_is_told_that_it_is_too_much(served):
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
        connection.request("POST", "/v1/completions", b" " * 20_000_000, {"content-type": "application/json"})
        assert connection.getresponse().status == 413
        connection.close()


def test_generate_prints_what_the_endpoint_gives(served):
    prompt = list(Workload(1, [24]).requests[0].prompt)
    offline = generate(
        "tiny", "--prompt-ids", ",".join(map(str, prompt)), "--max-tokens", "24", "--ignore-eos", "--logprobs", "2"
    )
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 2}
    reply = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()
    assert reply["system_fingerprint"] == offline["system_fingerprint"]
    choice = reply["choices"][0]
    assert choice["text"] == offline["text"]
    assert choice["logprobs"]["token_logprobs"] == [entry["logprob"] for entry in offline["logprobs"]]


def test_a_conversation_goes_on_where_its_beginning_is_cached(served):
    """Although another stream runs there: with two shards every second turn was computed anew."""
    text = "Count the sheep: " + " ".join(f"{i}, {i + 1} and {i + 2};" for i in range(40))
    asked = {"model": "tiny", "temperature": 0}
    other = {**asked, "prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=served.url, timeout=60) as client, contextlib.ExitStack() as running:
        for turn in range(4):
            reply = client.post("/v1/completions", json={**asked, "prompt": text, "max_tokens": 8}).raise_for_status()
            used = reply.json()["usage"]
            assert used["prompt_tokens"] > 200
            cached = used["prompt_tokens_details"]["cached_tokens"]
            assert cached > 200 if turn else cached == 0, (turn, used)
            text += f" then {turn}, {turn + 5} and {turn + 9} more sheep came."
            if turn == 0:
                stream = running.enter_context(client.stream("POST", "/v1/completions", json=other))
                lines = stream.iter_lines()  # which closes the stream when it is dropped
                assert stream.status_code == 200 and next(lines)


def test_clients_that_vanish_leave_no_kv(served):
    async def vanish(client: httpx.AsyncClient, i: int) -> None:
        body = {
            "model": "tiny",
            "prompt": "Once upon a time",
            "max_tokens": 1500,
            "ignore_eos": True,
            "stream": True,
            "seed": i,
        }
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    return

    async def go() -> None:
        async with httpx.AsyncClient(
            base_url=served.url, timeout=120, limits=httpx.Limits(max_connections=50)
        ) as client:
            await asyncio.gather(*(vanish(client, i) for i in range(200)))

    asyncio.run(go())
    deadline = time.monotonic() + 20
    while served.kv_blocks_used() and time.monotonic() < deadline:
        time.sleep(0.2)
    workers = [w for w in served.status()["workers"] if w["role"] == "attention"]
    assert [(w["kv_blocks_used"], w["running"], w["waiting"]) for w in workers] == [(0, 0, 0)] * len(workers)


def test_malformed_requests_change_nothing(served):
    with httpx.Client(base_url=served.url, timeout=60) as client:

        def canary():
            body = {"model": "tiny", "messages": SUM, "temperature": 0}
            return client.post("/v1/chat/completions", json=body).json()["choices"]

        before = canary()
        tokens = sum(w["tokens"] for w in served.status()["workers"] if w["role"] == "attention")
        bad = [
            ("messages", {"messages": []}), ("messages", {"messages": "hi"}),
            ("messages[0].role", {"messages": [{"role": "x", "content": "y"}]}),
            ("messages[0].content", {"messages": [{"role": "user", "content": 7}]}), ("model", {"model": "no-such"}),
            ("model", {"model": 3}), ("max_tokens", {"max_tokens": -1}), ("max_tokens", {"max_tokens": "many"}),
            ("max_tokens", {"max_tokens": True}), ("temperature", {"temperature": -1}),
            ("temperature", {"temperature": "hot"}), ("top_p", {"top_p": 2}), ("n", {"n": 10**9}),
            ("seed", {"seed": 1.5}), ("stop", {"stop": 5}), ("logprobs", {"logprobs": "yes"}),
            ("top_logprobs", {"logprobs": True, "top_logprobs": 99}),
            ("messages", {"messages": [{"role": "user", "content": "word " * 40000}]}),
            ("chat_template", {"chat_template": "{{ 1 }}"}), ("stream", {"stream": "yes"}),
            ("tool_choice", {"tool_choice": "required"}), ("top_k", {"top_k": -5}),
        ]  # fmt: skip
        for field, fields in bad:
            response = client.post("/v1/chat/completions", json={"model": "tiny", "messages": SUM} | fields)
            error = response.json()["error"]
            assert 400 <= response.status_code < 500 and error["param"] == field, (fields, response.text)
        for field, fields in [("prompt", {"prompt": ""}), ("prompt", {"prompt": []}), ("prompt[0]", {"prompt": [-4]}),
                              ("prompt", {"prompt": None}), ("prompt[1]", {"prompt": [1, 10**7]}),
                              ("max_tokens", {"prompt": "x", "max_tokens": 0}),
                              ("logprobs", {"prompt": "x", "logprobs": -1})]:  # fmt: skip
            response = client.post("/v1/completions", json={"model": "tiny"} | fields)
            assert 400 <= response.status_code < 500 and response.json()["error"]["param"] == field, (
                fields,
                response.text,
            )
        for content in (b"", b"{", b"[1, 2]", b"\xff\xfe"):
            response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            assert response.status_code == 400 and "error" in response.json()
        assert client.get("/v1/nothing").status_code == 404 and client.get("/v1/completions").status_code == 405
        assert sum(w["tokens"] for w in served.status()["workers"] if w["role"] == "attention") == tokens
        assert canary() == before


def test_async_client_streams(served):
    async def go() -> tuple[str, str]:
        async with AsyncClient(served.url) as client:
            whole = await client.complete("The days of the week are", max_tokens=16, temperature=0)
            parts = [
                chunk.text
                async for chunk in await client.complete(
                    "The days of the week are", max_tokens=16, temperature=0, stream=True
                )
            ]
            return whole.text, "".join(parts)

    whole, streamed = asyncio.run(go())
    assert whole == streamed and whole
