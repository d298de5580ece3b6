"""Every call of both clients: what it asks of the server, and what it makes of the answer."""

from __future__ import annotations

import asyncio
import inspect
import json

import httpx
import pytest
from pydantic import BaseModel

from isotherm.cluster.client import APIError, AsyncClient, Client, ConnectionFailedError

OPERATION = {"id": "op-1", "phase": "done"}
SAID = [{"role": "user", "content": "hi"}]
REPLY = {"id": "c", "model": "m", "choices": [{"index": 0, "message": {"content": "[1, 2]"}, "finish_reason": "stop"}]}


class Ids(BaseModel):
    ids: list[int]


def get(path):
    return ("GET", path, None)


# call → (arguments, the last request, its answer, what to look at of the value, which must be)
CALLS = {
    "models": ((), {}, get("/v1/models"), {"data": [{"id": "m"}]}, ["m"]),
    "model": (("a/b c",), {}, get("/v1/models/a/b%20c"), {"id": "a/b c"}, {"id": "a/b c"}),
    "tokenize": (
        ("hi",),
        {"add_special_tokens": False},
        ("POST", "/tokenize", {"prompt": "hi", "add_special_tokens": False, "model": "m"}),
        {"tokens": [1, 2], "count": 2},
        [1, 2],
    ),
    "detokenize": (([1, 2],), {}, ("POST", "/detokenize", {"tokens": [1, 2], "model": "m"}), {"prompt": "hi"}, "hi"),
    "ready": ((), {}, get("/ready"), {}, True),
    "status": ((), {}, get("/status"), {"workers": []}, {"workers": []}),
    "scale": (
        (),
        {"expert_groups": 3, "attention_shards": None, "drain_nodes": [],
         "copies": [{"layer": 1, "expert": 2, "count": None}], "dry_run": True,
         "idempotency_key": "k"},
        ("POST", "/admin/operations", {"dry_run": True, "idempotency_key": "k", "expert_groups": 3, "drain_nodes": [],
         "copies": [{"layer": 1, "expert": 2, "count": None}]}),
        OPERATION,
        OPERATION,
    ),
    "roll": (
        ("/m",),
        {"attention_shards": 1, "deadline_seconds": 9.0, "idempotency_key": "k", "manifest": {"isa": "avx2"}},
        ("POST", "/admin/operations",
         {"dry_run": False, "idempotency_key": "k", "model": "/m", "manifest": {"isa": "avx2"}, "attention_shards": 1,
          "deadline_seconds": 9.0}),
        OPERATION,
        OPERATION,
    ),
    "operation": (("op-1",), {}, get("/admin/operations/op-1"), OPERATION, OPERATION),
    "operations": ((), {}, get("/admin/operations"), {"operations": [OPERATION]}, [OPERATION]),
    "wait_for_operation": (("op-1",), {}, get("/admin/operations/op-1"), OPERATION, OPERATION),
    "experts": ((), {}, get("/admin/experts"), {"layers": []}, {"layers": []}),
    "set_autoscaler": (
        ("advise",), {}, ("POST", "/admin/autoscaler", {"mode": "advise"}), {"mode": "advise"}, {"mode": "advise"}
    ),
    "autoscaler": ((), {}, get("/admin/autoscaler"), {"mode": "on"}, {"mode": "on"}),
}  # fmt: skip
TESTED_ELSEWHERE = {
    "chat", "complete", "stream", "parse", "request", "local", "close", "aclose", "base_url",
    "batch", "batch_files", "events", "feed",
}  # fmt: skip


class Server:
    """Answers with one body, but for the list of models; has the requests."""

    def __init__(self, body):
        self.body = body
        self.asked: list[tuple] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        sent = json.loads(request.content) if request.content else None
        self.asked.append((request.method, request.url.raw_path.decode(), sent))
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        return httpx.Response(200, json=self.body)


def both(body, name, *arguments, **options):
    """(what was asked last, value or error) of the two clients, which must be one."""
    first, second = Server(body), Server(body)

    def blocking():
        with Client(transport=httpx.MockTransport(first)) as client:
            return getattr(client, name)(*arguments, **options)

    async def waiting():
        async with AsyncClient(transport=httpx.MockTransport(second)) as client:
            return await getattr(client, name)(*arguments, **options)

    outcomes = []
    for run in (blocking, lambda: asyncio.run(waiting())):
        try:
            outcomes.append(run())
        except APIError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] and first.asked == second.asked
    return first.asked[-1], outcomes[0]


@pytest.mark.parametrize("name", CALLS)
def test_a_call(name):
    arguments, options, request, body, value = CALLS[name]
    assert both(body, name, *arguments, **options) == (request, value)


def test_both_clients_have_the_same_calls_and_each_is_tested():
    public = {name for name in vars(Client) if not name.startswith("_")}
    awaited = {name for name in vars(AsyncClient) if not name.startswith("_")}
    assert public - {"close"} == awaited - {"aclose"} and public | awaited == set(CALLS) | TESTED_ELSEWHERE
    for name in public - {"close", "base_url", "local"}:
        blocking, waiting = (inspect.signature(vars(kind)[name]).parameters for kind in (Client, AsyncClient))
        assert list(blocking) == list(waiting), name
        assert [one.default for one in blocking.values()] == [one.default for one in waiting.values()], name


def test_chats_completions_and_typed_answers():
    body = {"messages": SAID, "temperature": 0, "bad_words": ["x"], "model": "m"}
    asked, reply = both(REPLY, "chat", "hi", temperature=0, bad_words=["x"])
    assert asked == ("POST", "/v1/chat/completions", body) and reply.text == "[1, 2]"
    asked, reply = both(REPLY, "complete", [1, 2], model="x")
    assert asked == ("POST", "/v1/completions", {"prompt": [1, 2], "model": "x"})
    asked, value = both(REPLY, "parse", SAID, list[int])
    assert value == [1, 2] and asked[2]["response_format"]["json_schema"]["schema"]["items"] == {"type": "integer"}


def test_a_target_with_a_name_that_there_is_not_is_refused():
    with Client(transport=httpx.MockTransport(Server(OPERATION))) as client:
        with pytest.raises(TypeError, match=r"unknown parameter 'expert_group' \(did you mean 'expert_groups'\?\)$"):
            client.scale(expert_group=3)
        with pytest.raises(TypeError, match="unknown parameter 'copies'$"):
            client.roll("/m", copies=[])


def test_a_chats_tokens():
    asked, tokens = both({"tokens": [5]}, "tokenize", SAID, chat_template_kwargs={"thinking": True})
    body = {"messages": SAID, "chat_template_kwargs": {"thinking": True}, "model": "m"}
    assert asked == ("POST", "/tokenize", body) and tokens == [5]


@pytest.mark.parametrize("name", ["tokenize", "detokenize", "operations"])
@pytest.mark.parametrize("body", [{}, [], {"tokens": [None], "operations": 5}])
def test_what_is_another_thing_is_an_error_of_ours(name, body):
    arguments = {"tokenize": ("hi",), "detokenize": ([1],), "operations": ()}[name]
    assert "the answer is no" in both(body, name, *arguments)[1]


def part(number: int, phases: dict, event: str = "change") -> bytes:
    operation = {**OPERATION, "entered": phases, "created": 1.0, "dry_run": False}
    data = json.dumps({"set": {"operation/op-1": operation}, "gone": []})
    return f"id: e:{number}\nevent: {event}\ndata: {data}\n\n".encode()


def test_events_are_those_that_come():
    """The operation comes to its second phase over the second connection, which begins where the first one broke."""
    begun = []

    def answer(request: httpx.Request) -> httpx.Response:
        begun.append((request.url.path, request.headers.get("last-event-id")))
        first = b": waiting\n\n" + part(1, {"planned": 1.0}, "snapshot")
        return httpx.Response(200, content=part(2, {"planned": 1.0, "done": 2.0}) if begun[-1][1] else first)

    async def waiting():
        async with AsyncClient(transport=httpx.MockTransport(answer)) as client:
            return await anext(client.events())

    with Client(transport=httpx.MockTransport(answer)) as client:
        one = next(client.events())
    assert (one.id, one.phase, one.time) == ("op-1", "done", 2.0)
    assert begun == [("/admin/events", None), ("/admin/events", "e:1")]
    assert asyncio.run(waiting()) == one


def test_a_feed_that_is_refused_raises_and_one_that_breaks_says_so():
    answers = [httpx.Response(200, content=part(1, {}, "snapshot")), httpx.Response(503), httpx.Response(403, json={})]
    with Client(transport=httpx.MockTransport(lambda request: answers.pop(0))) as client:
        states = client.feed()
        assert next(states).trouble == "" and "ended" in next(states).trouble and "503" in next(states).trouble
        with pytest.raises(APIError):
            next(states)
    with Client(transport=httpx.MockTransport(refuse)) as client, pytest.raises(ConnectionFailedError, match="no"):
        next(client.feed())


def refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("no")
