"""What a replica says of its requests with every piece of a reply, and when it looks."""

from __future__ import annotations

import asyncio
import itertools

from virtual_time import run_in_virtual_time

from isotherm.cluster.api.onward import KEY, PERIOD, Onward, OnwardMiddleware


class Engine:
    def __init__(self) -> None:
        self.looks = 0
        self.reason: str | None = None
        self.holds_up: str | None = None

    def not_ready(self) -> str | None:
        return self.reason

    async def held_up(self) -> str | None:
        self.looks += 1
        await asyncio.sleep(0.05 if self.holds_up is None else 1.5)
        return self.holds_up


async def streaming(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(10):
        await asyncio.sleep(1.0)
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def told(act, method="POST") -> list[tuple[str, float] | None]:
    """What each piece of a stream says, from one second to the next."""

    async def go():
        engine, sent = Engine(), []
        onward = Onward("ingress-a", engine, asyncio.get_running_loop().time)
        looking = asyncio.ensure_future(onward.keep_looking())

        async def send(message):
            sent.append(message.get(KEY))
            act(engine, len(sent))

        await asyncio.sleep(30)
        assert engine.looks == 0, "there is nobody who could be held up"
        await OnwardMiddleware(streaming, onward)({"type": "http", "method": method}, None, send)
        looks = engine.looks
        await asyncio.sleep(30)
        assert engine.looks - looks <= 1
        looking.cancel()
        return sent

    return run_in_virtual_time(go())


def test_pieces_say_how_long_ago_requests_were_seen_to_get_on():
    said = told(lambda engine, piece: None)
    assert said[0][1] > 1e9, "nothing is known yet"
    assert all(name == "ingress-a" and 0.05 <= seconds <= PERIOD + 0.1 + 1e-6 for name, seconds in said[1:])


def test_they_say_so_too_where_requests_do_not_get_on():
    def act(engine, piece):
        if piece == 4:
            engine.holds_up = "attention-0 has waited for expert-1 for 1.5 s"

    said = [seconds for _, seconds in told(act)]
    assert said[3] < 0.4 and [round(b - a) for a, b in itertools.pairwise(said[4:11])] == [1] * 6


def test_what_is_no_request_for_tokens_says_nothing():
    assert set(told(lambda engine, piece: None, "GET")) == {None}
