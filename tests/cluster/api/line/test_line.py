"""Both ends of a line, with what Ray Serve does in between played by a queue: it brings a replica's messages to the
proxy in order, and tells the replica where the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from types import SimpleNamespace

import pytest

from isotherm.cluster.api.line import frames, proxy_end, replica_end
from isotherm.cluster.api.line.frames import HEADER
from isotherm.cluster.api.line.proxy_end import LineLostError, ProxyLine, ProxyLineMiddleware
from isotherm.cluster.api.line.replica_end import Lines, ReplicaLineMiddleware
from isotherm.cluster.api.onward import KEY

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-of", b"replica")]
SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}


def start(headers=EVENTS):
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def body(piece, more=True):
    return {"type": "http.response.body", "body": piece, "more_body": more}


class Between:
    """Ray Serve: `app` is the proxy's; `replica` the application at the other side. `carried`: what went this way."""

    def __init__(self, replica, lines=None):
        self._replica = ReplicaLineMiddleware(replica, lines)
        self.carried, self.headers, self.replicas = [], [], []

    async def app(self, scope, receive, send):
        self.headers = scope["headers"]
        messages: asyncio.Queue = asyncio.Queue()

        async def put(message):
            messages.put_nowait(message)

        async def run():
            try:
                await self._replica(scope, receive, put)
                messages.put_nowait(None)
            except Exception as error:
                messages.put_nowait(error)

        task = asyncio.ensure_future(run())
        self.replicas.append(task)
        try:
            while (message := await messages.get()) is not None:
                if isinstance(message, Exception):
                    raise message
                self.carried.append(message)
                await send(message)
        finally:
            task.cancel()
            await asyncio.wait([task])


async def reply(between, line, headers=(), send=None, scope=SCOPE, **options):
    sent = []

    async def keep(message):
        sent.append(message)

    await ProxyLineMiddleware(between.app, line, **options)({**scope, "headers": list(headers)}, None, send or keep)
    return sent


@contextlib.contextmanager
def opened():
    line = ProxyLine()
    try:
        yield line
    finally:
        line.close()


def run(work):
    async def main():
        await asyncio.wait_for(work, 20)
        await asyncio.sleep(0.02)  # what was closed ends

    asyncio.run(main())


def text(sent):
    return b"".join(message.get("body", b"") for message in sent)


def streaming(pieces, last=b""):
    async def app(scope, receive, send):
        await send(start())
        for piece in pieces:
            await send(body(piece))
            await asyncio.sleep(0)
        await send(body(last, more=False))

    return app


def test_events_go_over_the_line_and_the_beginning_and_the_end_as_serve_has_them():
    async def main():
        with opened() as line:
            between = Between(streaming([b"one", b"two"], b"three"))
            sent = await reply(between, line)
            assert text(sent) == b"onetwothree" and sent[0] == start()
            assert [m.get("more_body") for m in sent] == [None, True, True, True, False]
            assert [m.get("body") for m in between.carried] == [None, b""]
            assert not line.streams

    run(main())


def test_many_streams_share_the_line_of_a_replica_and_none_gets_anothers_pieces():
    async def main():
        lines = Lines()
        with opened() as line:
            betweens = [Between(streaming([b"%d," % i] * 50), lines) for i in range(20)]
            for i, sent in enumerate(await asyncio.gather(*(reply(between, line) for between in betweens))):
                assert text(sent) == b"%d," % i * 50
            assert len(lines._lines) == 1

    run(main())


def test_what_is_no_stream_of_events_goes_as_serve_has_it():
    async def app(scope, receive, send):
        await send(start([(b"content-type", b"application/json")]))
        await send(body(b"{}", more=False))

    async def main():
        with opened() as line:
            between = Between(app)
            assert text(await reply(between, line)) == b"{}" and text(between.carried) == b"{}"

    run(main())


def test_a_replica_that_cannot_reach_the_line_sends_as_serve_has_it():
    async def main():
        with opened() as line:
            await line.open()
            line.name = "isotherm-line-of-another-host"
            between = Between(streaming([b"one", b"two"]))
            sent = await reply(between, line)
            assert text(sent) == text(between.carried) == b"onetwo"
            assert sent[0] == start()  # nothing says that it comes over a line

    run(main())


def test_the_log_says_once_of_each_proxy_that_it_cannot_be_reached(caplog):
    """Requests come through those of all hosts in turn."""

    async def main():
        lines = Lines()
        for name in ("isotherm-line-of-one-host", "isotherm-line-of-another-host") * 3:
            assert await lines.to(name) is None

    with caplog.at_level(logging.INFO, replica_end.__name__):
        run(main())
    assert len(caplog.records) == 2


def test_where_no_line_can_be_had_serve_has_it_all(monkeypatch):
    monkeypatch.setattr(proxy_end, "socket", SimpleNamespace(socket=frames.socket.socket))

    async def main():
        between = Between(streaming([b"one"]))
        assert text(await reply(between, ProxyLine())) == text(between.carried) == b"one"
        assert between.headers == []

    run(main())


def test_no_client_says_where_a_replica_sends_events():
    async def main():
        with opened() as line:
            between = Between(streaming([b"one"]))
            forged = (HEADER, b"isotherm-line-of-a-client/1")
            assert text(await reply(between, line, [forged, (b"host", b"a")])) == b"one"
            assert between.headers == [(b"host", b"a"), (HEADER, f"{line.name}/1".encode())]
        between = Between(streaming([b"one"]))
        closed = ProxyLine()
        closed._is_tried = True
        await reply(between, closed, [forged])
        assert between.headers == []

    run(main())


@pytest.mark.parametrize("end", [replica_end, proxy_end])
def test_processes_of_other_users_are_not_heard(monkeypatch, end):
    monkeypatch.setattr(end, "is_own_users", lambda socket: False)

    async def main():
        with opened() as line:
            between = Between(streaming([b"one"]))
            if end is replica_end:
                assert text(await reply(between, line)) == text(between.carried) == b"one"
            else:
                with pytest.raises(ConnectionError):
                    await reply(between, line, end_seconds=0.2)

    run(main())


def test_whose_process_it_is_is_what_the_system_says(monkeypatch):
    one, other = frames.socket.socketpair(frames.socket.AF_UNIX)
    with one, other:
        assert frames.is_own_users(one)
        monkeypatch.setattr(frames.os, "getuid", lambda: 54321)
        assert not frames.is_own_users(one)


def test_that_requests_get_on_is_told_with_every_piece():
    async def app(scope, receive, send):
        await send(start() | {KEY: ("ingress-1", 0.1)})
        await send(body(b"one") | {KEY: ("ingress-1", 0.25)})
        await send(body(b"", more=False) | {KEY: ("ingress-1", 0.5)})

    async def main():
        with opened() as line:
            sent = await reply(Between(app), line)
            assert [message[KEY] for message in sent] == [("ingress-1", 0.1), ("ingress-1", 0.25), ("ingress-1", 0.5)]

    run(main())


def test_a_client_that_takes_nothing_holds_up_its_replica_and_no_other_stream(monkeypatch):
    piece = b"x" * 1000
    made = 0

    async def app(scope, receive, send):
        nonlocal made
        await send(start())
        for _ in range(2000):
            await send(body(piece))
            made += 1
        await send(body(b"", more=False))

    async def main():
        lines, takes, got = Lines(), asyncio.Event(), []

        async def slow(message):
            await takes.wait()
            got.append(message)

        with opened() as line:
            waiting = asyncio.ensure_future(reply(Between(app, lines), line, send=slow_after_start(slow)))
            await asyncio.sleep(0.3)
            stopped = made
            assert 200 < stopped < 1800
            assert text(await reply(Between(streaming([b"one"]), lines), line)) == b"one"
            await asyncio.sleep(0.1)
            assert made == stopped
            takes.set()
            await waiting
            assert text(got) == piece * 2000 and made == 2000

    def slow_after_start(slow):
        async def send(message):
            if message["type"] != "http.response.start":
                await slow(message)

        return send

    run(main())


def test_a_client_that_goes_away_ends_the_replicas_work_and_frees_its_place_on_the_line():
    ended = []

    async def app(scope, receive, send):
        await send(start())
        try:
            while True:
                await send(body(b"x" * 1000))
                await asyncio.sleep(0)
        finally:
            ended.append(True)

    async def main():
        lines = Lines()
        with opened() as line:
            between = Between(app, lines)

            async def send(message):
                if message["type"] == "http.response.body":
                    await asyncio.Event().wait()  # held, too

            asking = asyncio.ensure_future(reply(between, line, send=send))
            await asyncio.sleep(0.3)
            asking.cancel()
            await asyncio.wait([asking])
            assert ended and not line.streams
            (other,) = lines._lines.values()
            assert not other._held and not other._open
            assert text(await reply(Between(streaming([b"one"]), lines), line)) == b"one"

    run(main())


def test_an_error_of_the_replica_comes_as_serve_tells_it():
    async def app(scope, receive, send):
        await send(start())
        await send(body(b"one"))
        raise RuntimeError("it died")

    async def main():
        with opened() as line:
            with pytest.raises(RuntimeError, match="it died"):
                await reply(Between(app), line)
            assert not line.streams

    run(main())


def test_a_reply_whose_line_breaks_never_looks_whole():
    goes_on = asyncio.Event()

    async def app(scope, receive, send):
        await send(start())
        await send(body(b"one"))
        await goes_on.wait()
        with contextlib.suppress(ConnectionError):
            await send(body(b"two"))
        await send(body(b"", more=False))

    async def main():
        lines, sent = Lines(), []

        async def send(message):
            sent.append(message)

        with opened() as line:
            asking = asyncio.ensure_future(reply(Between(app, lines), line, send=send))
            while text(sent) != b"one":
                await asyncio.sleep(0.01)
            (theirs,) = lines._lines.values()
            theirs._transport.abort()  # as where a file descriptor is closed by mistake: both processes live on
            await asyncio.sleep(0.1)
            goes_on.set()
            with pytest.raises(ConnectionError):
                await asking
            assert all(message.get("more_body", True) for message in sent)
            # The next one makes another.
            assert text(await reply(Between(streaming([b"one"]), lines), line)) == b"one"

    run(main())


def test_a_reply_is_never_made_of_two_replicas_pieces():
    """As if Serve had asked a second one after the first had begun."""

    async def app(scope, receive, send):
        (offer,) = [value for name, value in scope["headers"] if name == HEADER]
        name, _, number = offer.decode().partition("/")
        first = await Lines().to(name)
        await first.send(int(number), b"first", 0.0)
        await asyncio.sleep(0.05)
        await streaming([b"second"])(scope, receive, send)

    async def main():
        sent = []

        async def send(message):
            sent.append(message)

        with opened() as line:
            with pytest.raises(LineLostError):
                await reply(Between(app), line, send=send)
            assert b"second" not in text(sent) and all(message.get("more_body", True) for message in sent)

    run(main())


def test_a_reply_whose_end_does_not_come_over_the_line_never_looks_whole(monkeypatch):
    monkeypatch.setattr(replica_end, "end", lambda stream: b"")

    async def main():
        with opened() as line, pytest.raises(LineLostError):
            await reply(Between(streaming([b"one"])), line, end_seconds=0.2)

    run(main())


def test_what_is_no_http_passes_by():
    async def app(scope, receive, send):
        await send({"type": "lifespan.startup.complete"})

    async def main():
        line = ProxyLine()
        sent = await reply(Between(app), line, scope={"type": "lifespan"})
        assert sent == [{"type": "lifespan.startup.complete"}] and not line.is_open

    run(main())
