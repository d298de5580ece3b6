"""The bench client: what it makes of the times that chunks came, and of replies over real HTTP."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable

import pytest

from isotherm.cluster.cli.bench_load import LoadReport, LoadShape, StreamTimes, decode_rate, run_load


def test_decode_rate_counts_the_time_in_which_all_streams_run():
    # Waits for the other's prompt, then 10 tokens/s
    early = StreamTimes(0.0, [1.0, *(2.0 + i / 10 for i in range(1, 11))], 11)
    late = StreamTimes(0.0, [2.0 + i / 10 for i in range(21)], 41)  # two tokens a chunk, for two seconds
    assert decode_rate([early, late]) == pytest.approx(10 + 20)
    assert decode_rate([early]) == pytest.approx(10 / 2)
    assert decode_rate([late]) == pytest.approx(20)
    assert decode_rate([late, StreamTimes(0.0, [], 5)]) == pytest.approx(20), "its tokens made no text, so no chunk"


@pytest.mark.parametrize(
    "streams", [[], [StreamTimes(0.0, [1.0], 5)], [StreamTimes(0.0, [1.0, 2.0], 5), StreamTimes(0.0, [3.0, 4.0], 5)]]
)
def test_there_is_no_decode_rate_where_streams_did_not_run_together(streams: list[StreamTimes]):
    assert decode_rate(streams) == 0.0


async def load(answer: Callable[[dict, asyncio.StreamWriter], Awaitable[None]], shape: LoadShape) -> LoadReport:
    """The report of a load on a server that answers as told, and then hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
        )
        await answer(json.loads(await reader.readexactly(length)), writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        return await run_load(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "m", 100, shape)


def event(value: dict) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


async def stream(body: dict, writer: asyncio.StreamWriter) -> None:
    assert body["stream"]
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
    chunk = event({"choices": [{"text": "x"}], "usage": None})
    for part in (chunk, chunk + chunk[:7], chunk[7:] + chunk):  # events that come together, and in pieces
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.02)
    writer.write(event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}) + b"data: [DONE]\n\n")


def test_events_are_parsed_however_they_are_cut():
    report = asyncio.run(load(stream, LoadShape(3, math.inf, 4, 9)))
    assert (report.requests, report.failed, report.first_error) == (3, 0, "")
    assert report.output_tokens_per_s == pytest.approx(27 / report.seconds)
    assert report.decode_tokens_per_s > 0
    assert report.time_between_tokens_ms["p50"] > 0


def test_an_event_that_brings_the_end_alone_is_no_chunk():
    """It comes right after the last one: counted, it would make the time between tokens shorter, and the rate lower."""

    async def ended(body: dict, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for _ in range(3):
            writer.write(event({"choices": [{"text": "x", "finish_reason": None}]}))
            await writer.drain()
            await asyncio.sleep(0.03)
        writer.write(event({"choices": [{"text": "", "finish_reason": "length"}]}))
        writer.write(event({"choices": [], "usage": {"completion_tokens": 3}}) + b"data: [DONE]\n\n")

    report = asyncio.run(load(ended, LoadShape(1, math.inf, 4, 3)))
    assert report.time_between_tokens_ms["p99"] < 2 * report.time_between_tokens_ms["p50"]
    assert report.decode_tokens_per_s == pytest.approx(2 / 0.06, rel=0.2)


@pytest.mark.parametrize("asked", [True, False])
def test_ids_are_asked_for_where_every_token_is_to_make_an_event(asked: bool):
    bodies: list[dict] = []

    async def seen(body: dict, writer: asyncio.StreamWriter) -> None:
        bodies.append(body)
        await stream(body, writer)

    asyncio.run(load(seen, LoadShape(1, math.inf, 4, 9, token_ids=asked)))
    assert [body.get("return_token_ids", False) for body in bodies] == [asked]


async def whole(body: dict, writer: asyncio.StreamWriter) -> None:
    assert "stream" not in body
    reply = json.dumps({"usage": {"completion_tokens": body["max_tokens"]}}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(reply), reply))


def test_whole_replies():
    report = asyncio.run(load(whole, LoadShape(2, math.inf, 4, 9, stream=False)))
    assert report.output_tokens_per_s == pytest.approx(18 / report.seconds)
    assert (report.decode_tokens_per_s, report.time_between_tokens_ms) == (0.0, {})


async def refuse(_body: dict, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 503 Busy\r\nconnection: close\r\ncontent-length: 4\r\n\r\nbusy")


async def give_up(_body: dict, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + event({"error": {"message": "lost"}}))


@pytest.mark.parametrize(("answer", "words"), [(refuse, "HTTP 503"), (give_up, "lost")])
def test_what_fails_is_counted_and_told(answer: Callable[[dict, asyncio.StreamWriter], Awaitable[None]], words: str):
    report = asyncio.run(load(answer, LoadShape(2, math.inf, 4, 9)))
    assert report.failed == 2
    assert words in report.first_error
    assert report.output_tokens_per_s == 0
