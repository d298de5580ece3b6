from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import httpx
import pytest
from fake_engine import FakeEngine, http_server, write_tokenizer

from isotherm.cluster.api.app import build_app
from isotherm.cluster.client import (
    APIError,
    AsyncClient,
    Client,
    ClientError,
    ConnectionFailedError,
    StreamBrokenError,
    Usage,
)
from isotherm.cluster.text.tokenizer import Tokenizer

OPTIONS = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    engine = FakeEngine(tokenizer.vocab_size)
    with http_server(build_app(engine, tokenizer, "m")) as url:
        yield engine, url
    tokenizer.chat_template.close()


def event(text, finish=None):
    return (
        b"data: "
        + json.dumps({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}).encode()
        + b"\n\n"
    )


MODELS = {"object": "list", "data": [{"id": "m"}]}
GOOD = event("a") + event("b\u2028c", "stop") + b"data: [DONE]\n\n"


class Script:
    """A transport that answers POSTs from a list of (status, headers, body) or exceptions, and counts them."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.bodies: list = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=MODELS)
        self.bodies.append(json.loads(request.content))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        status, headers, body = answer
        return httpx.Response(status, headers=headers, content=body)


def stream_both(*answers, **options):
    """What Client and AsyncClient make of a streamed chat: (chunks, error) of each, which must agree, and the number of
    tries."""
    first, second = Script(*answers), Script(*answers)

    def blocking():
        got = []
        try:
            with Client(transport=httpx.MockTransport(first), **options) as client:
                for chunk in client.chat("hi", stream=True):
                    got.append(chunk)
        except Exception as error:
            return got, error
        return got, None

    async def waiting():
        got = []
        try:
            async with AsyncClient(transport=httpx.MockTransport(second), **options) as client:
                async for chunk in await client.chat("hi", stream=True):
                    got.append(chunk)
        except Exception as error:
            return got, error
        return got, None

    one, other = blocking(), asyncio.run(waiting())
    assert one[0] == other[0] and repr(one[1]) == repr(other[1]) and first.bodies == second.bodies
    return *one, len(first.bodies)


def test_against_the_real_app(served):
    engine, url = served
    with Client(url) as client:
        assert client.models() == ["m"] and client.ready() and client.status()["placement_version"] == 1
        whole = client.chat("hi", **OPTIONS)
        assert whole.finish_reason == "length" and whole.usage is not None and whole.usage.completion_tokens == 12
        chunks = list(client.chat([{"role": "user", "content": "hi"}], stream=True, **OPTIONS))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"] and chunks[
            -1
        ].usage == whole.usage
        text = client.complete("hello", n=2, **OPTIONS)
        assert (
            len(text.choices) == 2
            and "".join(chunk.text for chunk in client.complete("hello", stream=True, **OPTIONS)) == text.text
        )
        with pytest.raises(APIError) as info:
            client.chat([], **OPTIONS)
        assert (info.value.status, info.value.param) == (400, "messages")
        with pytest.raises(APIError):
            list(client.complete("", stream=True))
        engine.fail_after = 2
        with pytest.raises(StreamBrokenError, match="forward pass"):
            list(client.chat("hi", stream=True))
        engine.fail_after, engine.reason = None, "loading"
        assert not client.ready()
        engine.reason = None


def test_async_against_the_real_app(served):
    _, url = served

    async def go():
        async with AsyncClient(url) as client:
            assert (
                await client.models() == ["m"]
                and await client.ready()
                and (await client.status())["placement_version"] == 1
            )
            whole = await client.chat("hi", **OPTIONS)
            chunks = [chunk async for chunk in await client.chat("hi", stream=True, **OPTIONS)]
            assert "".join(chunk.text for chunk in chunks) == whole.text and chunks[-1].usage == whole.usage
            text = await client.complete("hello", **OPTIONS)
            assert (
                "".join([chunk.text async for chunk in await client.complete("hello", stream=True, **OPTIONS)])
                == text.text
            )
            with pytest.raises(APIError):
                await client.complete("", **OPTIONS)

    asyncio.run(go())


def test_leaving_a_stream_aborts_it(served):
    engine, url = served
    engine.delay_s = 0.01
    with Client(url) as client:
        stream = client.complete("hello", stream=True, max_tokens=400)
        next(stream)
        stream.close()
        for _ in range(200):
            if not engine.open:
                break
            client.models()
    engine.delay_s = 0.0
    assert not engine.open


def test_a_stream_that_is_left_is_aborted(served):
    """Both clients; in the middle of the reply, and by an error of whoever reads it."""
    engine, url = served
    engine.delay_s = 0.01

    async def leave() -> None:
        async with AsyncClient(url) as client, client.stream("hello", max_tokens=400) as stream:
            async for piece in stream:
                assert piece.text or piece.reasoning or piece.usage  # the tokens are drawn: it may be a thought
                break

    with Client(url) as client:
        with pytest.raises(KeyError), client.stream("hello", max_tokens=400) as stream:
            for piece in stream:
                raise KeyError(piece.text)
        assert stream.completion.text or stream.completion.reasoning  # what had come
        asyncio.run(leave())
        for _ in range(200):
            if not engine.open:
                break
            client.models()
    engine.delay_s = 0.0
    assert not engine.open


def test_a_streams_pieces_are_the_whole_reply(served):
    _, url = served
    options = {**OPTIONS, "n": 2, "seed": 3, "logprobs": True, "top_logprobs": 2}

    async def waiting():
        async with AsyncClient(url) as client, client.stream("hi", **options) as stream:
            return await stream.rest()

    with Client(url) as client:
        whole = client.chat("hi", **options)
        with client.stream("hi", **options) as stream:
            gathered = stream.rest()
        for other in (gathered, asyncio.run(waiting())):
            assert (other.choices, other.usage, other.model) == (whole.choices, whole.usage, "m")
        assert other.system_fingerprint == "isotherm-0123456789ab" and len(whole.logprobs[0].top) == 2
        text = client.complete("hello", logprobs=2, **OPTIONS)
        assert client.complete("hello", logprobs=2, stream=True, **OPTIONS).rest().choices == text.choices
        assert len(text.logprobs) == 12


def test_complete_stream():
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}\n\n'
    chunks, error, tries = stream_both((200, {}, b": comment\n\n" + event("a") + usage + b"data: [DONE]\n\n"))
    assert error is None and tries == 1
    assert [chunk.text for chunk in chunks] == ["a", ""] and chunks[-1].usage == Usage(1, 2, 0)


@pytest.mark.parametrize(
    "body",
    [
        event("a"),
        event("a") + b'data: {"error": {"message": "broke"}}\n\n',
        event("a") + b"data: {\n\n",
        event("a") + b"data: [DO",
    ],
)
def test_broken_streams(body):
    chunks, error, tries = stream_both((200, {}, body))
    assert isinstance(error, StreamBrokenError) and [chunk.text for chunk in chunks] == ["a"] and tries == 1


@pytest.mark.parametrize(
    "failure", [(503, {"retry-after": "0"}, b""), (429, {"retry-after": "0"}, b"{}"), httpx.ConnectError("refused")]
)
def test_retried_before_the_first_token(failure):
    chunks, error, tries = stream_both(failure, failure, (200, {}, GOOD))
    assert error is None and tries == 3 and [chunk.text for chunk in chunks] == ["a", "b\u2028c"]
    chunks, error, tries = stream_both(failure, failure, failure)
    assert isinstance(error, ConnectionFailedError if isinstance(failure, Exception) else APIError) and tries == 3
    _, error, tries = stream_both(failure, max_retries=0)
    assert error is not None and tries == 1


@pytest.mark.parametrize(
    "failure", [(400, {}, b'{"error": {"message": "m", "param": "n"}}'), (500, {}, b"oops"), httpx.ReadTimeout("slow")]
)
def test_not_retried(failure):
    _, error, tries = stream_both(failure)
    assert error is not None and tries == 1


def test_a_break_after_the_first_token_is_not_retried():
    class Breaking(httpx.SyncByteStream):
        def __iter__(self):
            yield event("a")
            raise httpx.ReadError("reset")

    def answer(request):
        return httpx.Response(200, json=MODELS) if request.method == "GET" else httpx.Response(200, stream=Breaking())

    stream = Client(transport=httpx.MockTransport(answer)).chat("hi", stream=True)
    assert next(stream).text == "a"
    with pytest.raises(StreamBrokenError, match="reset"):
        next(stream)


@pytest.mark.parametrize(
    ("base", "asked"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/models"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1/models"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1/models"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1/models"),
        ("https://gateway.example/tiny/v1", "https://gateway.example/tiny/v1/models"),
    ],
)
def test_a_base_url_may_end_in_v1_as_openais_does(base, asked):
    seen = []

    def answer(request):
        seen.append(str(request.url))
        return httpx.Response(200, json=MODELS)

    assert Client(base, transport=httpx.MockTransport(answer)).models() == ["m"] and seen == [asked]


PROXIED = """
import sys
from isotherm.cluster.client import AsyncClient, Client
url = sys.argv[1]
for client in (Client(url), AsyncClient(url)):
    http = client._http
    print(http._transport_for_url(http.base_url) is http._transport)
"""


@pytest.mark.parametrize(
    ("url", "direct"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost:8000", True),
        ("http://[::1]:8000", True),
        ("http://0.0.0.0:8000", True),
        ("http://10.1.2.3:8000", False),
        ("http://server.example", False),
    ],
)
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTP_PROXY", "http://127.0.0.1:9"),
        ("http_proxy", "http://127.0.0.1:9"),
        ("ALL_PROXY", "http://127.0.0.1:9"),
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("all_proxy", "foo://127.0.0.1:9"),
    ],
)
def test_a_proxy_is_for_other_machines(url, direct, variable, value):
    if not direct and not value.startswith("http:"):
        pytest.skip("it cannot be used")
    environment = {"PATH": "/usr/bin:/bin", variable: value, "no_proxy": "[::1"}
    command = [sys.executable, "-c", PROXIED, url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [str(direct)] * 2


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_the_environment_names_and_cannot_be_used_is_an_error_of_the_clients(monkeypatch, kind):
    monkeypatch.setenv("ALL_PROXY", "foo://h:1")
    with pytest.raises(ClientError, match="^ALL_PROXY is 'foo://h:1'"):
        kind("http://server.example")
    kind("http://server.example", transport=httpx.MockTransport(lambda request: httpx.Response(200)))
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with pytest.raises(ClientError, match="SSL_CERT_FILE is '/nowhere/ca.pem'.*No such file"):
        kind()


def test_a_server_of_this_machine_is_reached_beside_a_proxy(served):
    code = "import sys; from isotherm.cluster.client import Client; print(Client(sys.argv[1]).models())"
    environment = {"PATH": "/usr/bin:/bin", "HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code, served[1]], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "['m']", done.stderr


def line(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


@pytest.mark.parametrize(
    "odd",
    [
        line(choices=None),
        line(choices=[]),
        line(),
        line(choices=[None]),
        line(choices=[{"index": 0, "delta": None, "finish_reason": None}]),
        line(choices=[{"index": 0, "delta": {"content": None, "role": "assistant"}}]),
        line(choices=[{"delta": {}}], usage=None, error=None),
        line(choices=[{"index": None, "text": None, "finish_reason": None}]),
        line(choices=None, usage={}),
        b": a comment\n\n",
    ],
)
def test_fields_that_are_null_or_missing_in_a_stream_are_passed_over(odd):
    chunks, error, _ = stream_both((200, {}, odd + GOOD))
    assert error is None and [chunk.text for chunk in chunks] == ["a", "b\u2028c"]


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (b"data: null\n\n", "no object"),
        (b"data: []\n\n", "no object"),
        (line(choices="x"), "OpenAI's form"),
        (line(choices=[{"delta": "x"}]), "OpenAI's form"),
        (line(choices=[{"delta": {"content": 5}}]), "OpenAI's form"),
        (line(choices=[], usage={"prompt_tokens": "many"}), "OpenAI's form"),
        (line(error="overloaded"), "overloaded"),
        (line(error={"message": None}), "reported an error"),
        (line(error={"message": "broke"}), "broke"),
    ],
)
def test_what_is_no_event_is_an_error_of_ours(odd, says):
    _, error, _ = stream_both((200, {}, event("a") + odd + GOOD))
    assert isinstance(error, StreamBrokenError) and says in str(error)


def test_usage_with_nulls_counts_what_is_there():
    usage = line(choices=[], usage={"prompt_tokens": 3, "completion_tokens": None, "prompt_tokens_details": None})
    chunks, error, _ = stream_both((200, {}, usage + GOOD))
    assert error is None and chunks[0].usage == Usage(3, 0, 0)


def test_a_thought_is_told_apart_from_the_text():
    """Under either name that servers give it; ours gives both."""
    both = {"reasoning_content": "hm", "reasoning": "hm"}
    body = line(choices=[{"delta": both}]) + line(choices=[{"delta": {"reasoning": "m"}}]) + event("7", "stop")
    usage = line(choices=[], usage={"completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 2}})
    chunks, error, _ = stream_both((200, {}, body + usage + b"data: [DONE]\n\n"))
    assert error is None and [(chunk.reasoning, chunk.text) for chunk in chunks] == [
        ("hm", ""),
        ("m", ""),
        ("", "7"),
        ("", ""),
    ]
    assert chunks[-1].usage == Usage(0, 3, 0, 2)
    whole = whole_reply({"choices": [{"message": {**both, "content": "7"}}]})
    assert (whole.reasoning, whole.text) == ("hm", "7")
    assert whole_reply({"choices": [{"message": {"content": "7"}}]}).reasoning == ""


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"choices": [{"message": {"content": None, "tool_calls": []}}]}, ""),
        ({"choices": [{"message": None}], "usage": None, "id": None}, ""),
        ({"choices": [{"text": None}, None]}, ""),
        ({"choices": [{"index": 0, "message": {"content": "hi"}}], "usage": {"prompt_tokens": 1}}, "hi"),
    ],
)
def test_whole_replies_with_nulls(body, text):
    assert whole_reply(body).text == text


@pytest.mark.parametrize(
    "body",
    [{"choices": None}, {"choices": []}, {}, [], "x", {"choices": [5]}, {"choices": [{"message": {"content": 5}}]}],
)
def test_what_is_no_reply_is_an_error_of_ours(body):
    with pytest.raises(APIError):
        whole_reply(body)


def whole_reply(body):
    def answer(request):
        return httpx.Response(200, json=MODELS if request.method == "GET" else body)

    return Client(transport=httpx.MockTransport(answer)).chat("hi")


@pytest.mark.parametrize("body", [{"data": None}, {}, [], {"data": [{}]}])
def test_what_is_no_list_of_models_is_an_error_of_ours(body):
    with pytest.raises(APIError, match="list of models"):
        Client(transport=httpx.MockTransport(lambda request: httpx.Response(200, json=body))).models()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"error": "no such model"}, "no such model"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"message": "busy"}, "busy"),
        ([], "OpenAI's form"),
    ],
)
def test_errors_of_other_servers_are_told(body, says):
    with pytest.raises(APIError, match=says) as info:
        Client(transport=httpx.MockTransport(lambda request: httpx.Response(404, json=body))).models()
    assert info.value.status == 404


def test_api_key_model_and_request():
    seen = []

    def answer(request):
        seen.append(request)
        return httpx.Response(200, json=MODELS if request.method == "GET" else {"x": 1}, headers={"x-request-id": "r"})

    client = Client(transport=httpx.MockTransport(answer), api_key="secret")
    raw = client.request("POST", "/v1/completions", {"model": "given"})
    assert (raw.status, raw.request_id, raw.body) == (200, "r", {"x": 1})
    assert (
        seen[0].headers["authorization"] == "Bearer secret"
        and str(seen[0].url) == "http://127.0.0.1:8000/v1/completions"
    )


def test_imports_neither_torch_nor_ray():
    code = (
        "import sys; from isotherm.cluster.client import Client, AsyncClient; "
        "print(sorted({'torch', 'ray', 'tokenizers'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_operations_are_begun_and_waited_for():
    """Both clients ask the same; each operation ends at the third look."""
    asked: list[tuple[str, str, dict | None]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        asked.append((request.method, request.url.path, body))
        if request.url.path.startswith("/admin/operations"):
            looks = sum(method == "GET" for method, *_ in asked)
            return httpx.Response(
                202 if body else 200, json={"id": "op-1", "phase": "done" if looks >= 3 else "preparing"}
            )
        return httpx.Response(200, json={"route": request.url.path})

    def blocking() -> list:
        with Client(transport=httpx.MockTransport(answer)) as client:
            begun = client.scale(expert_groups=3, idempotency_key="k")
            with pytest.raises(TimeoutError, match="op-1 is still preparing"):
                client.wait_for_operation("op-1", timeout=-1)
            return [
                begun,
                client.wait_for_operation("op-1"),
                client.operation("op-1"),
                client.experts(),
                client.autoscaler(),
            ]

    async def waiting() -> list:
        async with AsyncClient(transport=httpx.MockTransport(answer)) as client:
            begun = await client.scale(expert_groups=3, idempotency_key="k")
            with pytest.raises(TimeoutError, match="op-1 is still preparing"):
                await client.wait_for_operation("op-1", timeout=-1)
            return [
                begun,
                await client.wait_for_operation("op-1"),
                await client.operation("op-1"),
                await client.experts(),
                await client.autoscaler(),
            ]

    one, first = blocking(), asked[:]
    asked.clear()
    other = asyncio.run(waiting())
    assert one == other and first == asked
    assert one[1]["phase"] == "done" and one[3:] == [{"route": "/admin/experts"}, {"route": "/admin/autoscaler"}]
    assert first[0] == ("POST", "/admin/operations", {"dry_run": False, "idempotency_key": "k", "expert_groups": 3})


def test_a_key_is_made_for_each_operation():
    keys = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(json.loads(request.content)["idempotency_key"])
        return httpx.Response(202, json={})

    async def waiting() -> None:
        async with AsyncClient(transport=httpx.MockTransport(answer)) as client:
            await client.scale(attention_shards=2)

    with Client(transport=httpx.MockTransport(answer)) as client:
        client.scale(attention_shards=2)
    asyncio.run(waiting())
    assert len(set(keys)) == 2 and all(keys)
