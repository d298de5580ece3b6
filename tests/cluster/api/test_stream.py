"""Streams that wait: their status line comes at once, comments keep them alive, and what fails then is an event."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import ClientDisconnect

from isotherm.cluster.api.replies import COMMENT
from isotherm.cluster.api.stream import EventStream


class Client:
    """Both ends of one request. `sent` has what was sent, with the seconds since the start."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[tuple[float, bytes | str]] = []
        self.begin = asyncio.get_running_loop().time()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        what = message["type"] if message["type"] == "http.response.start" else message["body"]
        self.sent.append((asyncio.get_running_loop().time() - self.begin, what))


class Events:
    """Events after waits; an exception instead of one is raised. `closed` once its cleaning up has run."""

    def __init__(self, *script):
        self.script, self.closed = script, False

    async def __call__(self):
        try:
            for wait, what in self.script:
                await asyncio.sleep(wait)
                if isinstance(what, Exception):
                    raise what
                yield what
        finally:
            self.closed = True


def serve(script, first_event_s=0.05, silence_s=10.0, gone_after=None):
    events = Events(*script)

    async def go():
        client = Client()
        if gone_after is not None:
            asyncio.get_running_loop().call_later(gone_after, client.gone.set)
        stream = EventStream(events(), lambda error: f"error {error}".encode(), silence_s, COMMENT)
        await stream.first_event(client.receive, first_event_s)
        await stream({"type": "http"}, client.receive, client.send)
        return client.sent

    try:
        return asyncio.run(go()), events
    finally:
        assert events.closed


def bodies(sent):
    return [what for _, what in sent]


def test_a_quick_stream_is_just_its_events():
    sent, _ = serve([(0, b"a"), (0, b"b")])
    assert bodies(sent) == ["http.response.start", b"a", b"b", b""]


def test_the_status_line_does_not_wait_for_long():
    sent, _ = serve([(0.6, b"a")])
    assert bodies(sent) == ["http.response.start", b"a", b""]
    assert sent[0][0] < 0.4 < sent[1][0]


def test_comments_come_before_the_first_event_and_between_events():
    sent, _ = serve([(0.3, b"a"), (0.02, b"b"), (0.3, b"c")], silence_s=0.1)
    got = bodies(sent)
    assert got[0] == "http.response.start" and got[-1] == b""
    first, second, third = got.index(b"a"), got.index(b"b"), got.index(b"c")
    assert set(got[1:first]) == {b": waiting\n\n"} == set(got[second + 1 : third])
    assert second == first + 1, "no comment where events follow each other"
    assert len(got[1:first]) <= 3


@pytest.mark.parametrize("script", [[(0, ValueError("no"))], [(0.01, ValueError("no"))]])
def test_an_error_before_the_status_line_is_raised(script):
    with pytest.raises(ValueError, match="no"):
        serve(script)


def test_an_error_after_the_status_line_is_an_event_and_the_last():
    assert bodies(serve([(0.2, ValueError("late"))])[0]) == ["http.response.start", b"error late", b""]
    assert bodies(serve([(0, b"a"), (0, ValueError("no"))])[0]) == ["http.response.start", b"a", b"error no", b""]


def test_a_client_that_goes_away_ends_the_events():
    with pytest.raises(ClientDisconnect):
        serve([(5, b"a")], first_event_s=5, gone_after=0.05)
    sent, _ = serve([(5, b"a")], gone_after=0.15)
    assert bodies(sent) == ["http.response.start"]
    sent, _ = serve([(0, b"a"), (5, b"b")], gone_after=0.15)
    assert bodies(sent) == ["http.response.start", b"a"]
