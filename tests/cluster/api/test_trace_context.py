"""W3C's trace context, in and out."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.request_book import RequestBook
from isotherm.cluster.api.trace_context import begin

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


def test_a_request_goes_on_with_the_trace_that_it_brings():
    context = begin(PARENT, "vendor=1", 0.0, lambda: 0.5)
    assert (context.trace, context.parent, context.sampled, context.state) == (TRACE, SPAN, True, "vendor=1")
    assert context.span not in (SPAN, "0" * 16) and context.header == f"00-{TRACE}-{context.span}-01"
    assert begin(PARENT[:-1] + "0", None, 1.0, lambda: 0.5).sampled is False, "its trace says so"
    assert begin(f"cc-{TRACE}-{SPAN}-01-more", None, 0.0, lambda: 0.5).trace == TRACE, "a later version has more"


@pytest.mark.parametrize(
    "given",
    [None, "", "00", PARENT.upper(), f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
     PARENT + "-more", "x" * 1000],
)  # fmt: skip
def test_what_is_no_context_begins_a_new_trace(given):
    context = begin(given, "vendor=1", 0.5, lambda: 0.4)
    assert context.trace != TRACE and len(context.trace) == 32 and not context.parent and not context.state
    assert context.sampled and not begin(given, None, 0.5, lambda: 0.6).sampled


class Observer:
    def __init__(self, traced: bool) -> None:
        self.book = RequestBook()
        if traced:
            self.book.trace(1.0)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("max_tokens", [2, -1])
def test_replies_and_errors_say_their_own_span(engine, tokenizer, traced, max_tokens):
    observer = Observer(traced)
    app = build_app(engine, tokenizer, "m", observer=observer)  # type: ignore[arg-type]

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            body = {"model": "m", "prompt": "a", "max_tokens": max_tokens}
            return await client.post("/v1/completions", json=body, headers={"traceparent": PARENT})

    reply = asyncio.run(go())
    (record,) = observer.book.recent()
    assert reply.headers.get("traceparent") == (record.trace.header if traced else None)
    assert record.as_json()["trace"] == (TRACE if traced else "")
