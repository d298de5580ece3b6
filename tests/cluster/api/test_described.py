"""/openapi.json is true: every route is in it, and what it says of bodies is what is checked; and /docs shows it."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser

import httpx
import jsonschema
import pytest
from fake_engine import FakeEngine, write_tokenizer
from fake_observer import FakeObserver
from starlette.routing import Route

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.batches.service import BatchLimits, BatchService
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.completion import CompletionBody
from isotherm.cluster.api.bodies.messages import MessagesBody
from isotherm.cluster.api.bodies.responses import ResponsesBody
from isotherm.cluster.api.described import DESCRIBED
from isotherm.cluster.text.tokenizer import Tokenizer


class FakeAdmin:
    """Its routes are looked at, not asked."""


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    tokenizer = Tokenizer.load(write_tokenizer(folder))
    batches = BatchService(Store(folder, 1 << 20, 10_000), BatchLimits(), 100_000)
    engine = FakeEngine(tokenizer.vocab_size)
    yield build_app(engine, tokenizer, "org/m", admin=FakeAdmin(), batches=batches, observer=FakeObserver())  # type: ignore[arg-type]
    tokenizer.chat_template.close()


MESSAGES = {"messages": [{"role": "user", "content": "x"}]}
MINIMAL: dict = {
    ChatBody: MESSAGES,
    CompletionBody: {"prompt": "x"},
    ResponsesBody: {"input": "x"},
    MessagesBody: {**MESSAGES, "max_tokens": 5},
}


def call(app, method, path, **kwargs):
    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(go())


@pytest.fixture(scope="module")
def document(app):
    return call(app, "GET", "/openapi.json").json()


def routes(app):
    return {(method, route.path) for route in app.routes for method in route.methods - {"HEAD"}}


def test_every_route_is_in_it_and_every_operation_is_a_route(app, document):
    assert all(isinstance(route, Route) for route in app.routes)
    listed = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert listed == {(method, re.sub(r":\w+}", "}", path)) for method, path in routes(app)}
    ids = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(set(ids)) == len(ids)


def test_every_route_is_described_and_nothing_else_is(app):
    assert routes(app) == DESCRIBED.keys()
    assert all(about.summary for about in DESCRIBED.values())


def test_routes_that_are_not_there_are_not_in_it(app):
    bare = call(build_app(FakeEngine(10), None, "m"), "GET", "/openapi.json").json()  # type: ignore[arg-type]
    operators = ("/admin", "/metrics", "/v1/files", "/v1/batches")
    assert [path for path in bare["paths"] if path.startswith(operators)] == ["/admin/events"]  # it has less to tell


def test_every_body_has_a_schema_and_every_reference_an_end(document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            takes_one = method == "post" and not path.endswith("/cancel")
            assert ("requestBody" in operation) == takes_one, (method, path)
            assert {"default"} < operation["responses"].keys()
    found = set(re.findall(r"'#/components/schemas/(\w+)'", str(document)))
    assert found == document["components"]["schemas"].keys()
    for name, schema in document["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["type"] == "object", name


@pytest.mark.parametrize("body", [ChatBody, CompletionBody, ResponsesBody, MessagesBody])
def test_fields_are_those_that_are_checked_and_refused_ones_are_said_to_be(document, body):
    schema = document["components"]["schemas"][body.__name__]
    older = {**getattr(body, "older", {}), **getattr(body, "renamed", {})}
    harmless = getattr(body, "harmless", {}).keys()
    known = {field.alias or name for name, field in body.model_fields.items()} | body.neutral.keys() | harmless
    known |= older.keys()
    assert schema["properties"].keys() == known
    assert all(schema["properties"][name]["description"].startswith("refused") for name in older)
    for name, neutral in body.neutral.items():
        assert schema["properties"][name]["description"].startswith("refused")
        assert schema["properties"][name]["enum"] == [*neutral, None]
    resolved = jsonschema.Draft202012Validator(
        {"$ref": f"#/components/schemas/{body.__name__}", "components": document["components"]}
    )
    base = {"model": "m", **MINIMAL[body]}
    assert resolved.is_valid({**base, "temperature": 0.5, "n": 1, "unknown": 1})
    for wrong in ({"temperature": "hot"}, {"n": "1"}, {"model": ""}, {"stream": 1}):
        assert not resolved.is_valid({**base, **wrong}), wrong


def test_good_answers_are_as_described(app, document):
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for method, path, body in (
        ("POST", "/v1/chat/completions", {"model": "org/m", **chat, "max_tokens": 2}),
        ("POST", "/v1/completions", {"model": "org/m", "prompt": "x"}),
        ("POST", "/v1/responses", {"model": "org/m", "input": "hi", "max_output_tokens": 2}),
        ("POST", "/v1/responses/input_tokens", {"model": "org/m", "input": "hi"}),
        ("POST", "/v1/messages", {"model": "org/m", **chat, "max_tokens": 2}),
        ("POST", "/v1/messages/count_tokens", {"model": "org/m", **chat}),
        ("POST", "/v1/messages", {"model": "nope", **chat, "max_tokens": 2}),
        ("POST", "/tokenize", chat),
        ("POST", "/tokenize", {"prompt": "x"}),
        ("POST", "/detokenize", {"tokens": [1]}),
        ("GET", "/v1/models", None),
        ("GET", "/v1/files", None),
        ("GET", "/v1/batches", None),
        ("GET", "/health", None),
        ("GET", "/ready", None),
        ("GET", "/version", None),
        ("GET", "/openapi.json", None),
        ("GET", "/nope", None),
    ):
        answer = call(app, method, path, json=body)
        if answer.status_code == 200:
            content = document["paths"][path][method.lower()]["responses"]["200"]["content"]
        else:
            form = "MessagesError" if path == "/v1/messages" else "Error"
            content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{form}"}}}
        schema = {**content["application/json"]["schema"], "components": document["components"]}
        jsonschema.validate(answer.json(), schema)
    assert call(app, "GET", "/nope").status_code == call(app, "POST", "/v1/messages", json={}).status_code + 4 == 404


class Page(HTMLParser):
    """The words of a page, and what it would load or run."""

    def __init__(self):
        super().__init__()
        self.words, self.loads, self.anchors, self.links = "", [], set(), set()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "object", "embed") or (tag == "link") or "src" in values:
            self.loads.append(tag)
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a":
            self.links.add(values["href"])

    def handle_data(self, data):
        self.words += data


def test_the_page_shows_all_of_it_and_loads_nothing(app, document):
    answer = call(app, "GET", "/docs/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Page()
    page.feed(answer.text)
    assert not page.loads and "://" not in answer.text
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.anchors
    assert page.links - {f"#{name}" for name in page.anchors} == {"openapi.json"}
    for path in document["paths"]:
        assert path in page.words
    for name, schema in document["components"]["schemas"].items():
        assert name in page.anchors
        assert all(field in page.words for field in schema.get("properties", {}))


def filled(path):
    return re.sub(r"{(\w+)(:path)?}", "x", path)


def test_head_options_and_slashes_of_every_route(app):
    """HEAD wherever GET is, without a body; OPTIONS says which methods there are; slashes too many mean nothing."""
    quiet = {path for method, path in routes(app) if method == "GET" and not path.startswith(("/admin", "/metrics"))}
    for path in quiet:
        got, head = (call(app, method, filled(path)) for method in ("GET", "HEAD"))
        assert got.status_code == head.status_code and not head.content, path
        assert got.headers["content-type"] == head.headers["content-type"]
        slashes = call(app, "GET", "http://localhost" + filled(path).replace("/", "//") + "/")
        assert slashes.status_code == got.status_code, path
    for path in {path for _, path in routes(app)}:
        options = call(app, "OPTIONS", filled(path))
        allowed = {method for method, other in routes(app) if other == path}
        said = set(options.headers["allow"].split(", "))
        assert options.status_code == 204 and said - {"HEAD"} == allowed, path
        assert call(app, "PATCH", filled(path)).status_code == 405, path
