"""Many clients at once, each always with a request open, in a process that costs the machine little; and /health asked
meanwhile from another one.

python burst.py '{"port": 8000, "clients": 600, "seconds": 30}'    prints a report as JSON

Raw sockets and no JSON per chunk: the clients share two cores with the server that they load."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import multiprocessing
import random
import re
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import uvloop

_USAGE = re.compile(rb'"completion_tokens":(\d+)')
_END = b"0\r\n\r\n"


@dataclass(frozen=True)
class Burst:
    """`warm` seconds pass before anything is counted; then `seconds` are. Outputs are from half to one and a half times
    `tokens` long. A client that is refused waits for as long as it is told, but for no longer than `patience`
    seconds."""

    port: int
    clients: int
    seconds: float = 30.0
    patience: float = 60.0
    grace: float = 60.0  # for streams that are open when the time is over
    warm: float = 3.0
    tokens: int = 64
    prompt: int = 16
    vocab: int = 1280
    model: str = "tiny"
    seed: int = 0
    keys: tuple[str, ...] = ()  # of the clients, in turn; none: they have no key


@dataclass
class Report:
    """`goodput`: tokens per second of streams that were complete within the counted time, `by_key` too. `wrong`: what
    no answer may be, the first few of them. `health`: seconds that /health took, each time, from the first moment on;
    `first`: seconds to the status line of a stream that was let in; `whole`: to its end."""

    goodput: float = 0.0
    complete: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    by_key: dict[str, float] = field(default_factory=dict)
    retry_after: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rank(values: list[float], part: float) -> float:
    """The value at a part of the way (0.99: the 99th percentile), by the nearest rank."""
    return sorted(values)[max(0, math.ceil(len(values) * part) - 1)] if values else math.nan


class Answer(asyncio.Protocol):
    """One answer on a connection that is kept."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.began = 0.0
        self.done: asyncio.Future[bytes] | None = None
        self.lost = False

    def connection_lost(self, _error: Exception | None) -> None:
        self.lost = True
        if self.done is not None and not self.done.done():
            self.done.set_result(bytes(self.data))

    def data_received(self, data: bytes) -> None:
        self.began = self.began or time.perf_counter()
        self.data += data
        if self.done is not None and not self.done.done() and self._is_whole():
            self.done.set_result(bytes(self.data))

    def _is_whole(self) -> bool:
        if self.data.endswith(_END):
            return True
        head, found, body = self.data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head) if found else None
        return length is not None and len(body) >= int(length[1])


class Client:
    """One that always has a request open, over a connection that is kept."""

    def __init__(self, burst: Burst, number: int, begin: float, report: Report) -> None:
        self._burst, self._begin, self._report = burst, begin, report
        self._end = begin + burst.seconds
        self._rng = random.Random(burst.seed * 10**6 + number)
        self._key = burst.keys[number % len(burst.keys)] if burst.keys else ""
        self._answer: Answer | None = None
        self._transport: asyncio.Transport | None = None

    async def run(self) -> None:
        try:
            while time.perf_counter() < self._end:
                await self._ask()
        finally:
            if self._transport is not None:
                self._transport.close()

    async def _ask(self) -> None:
        burst, loop, report = self._burst, asyncio.get_running_loop(), self._report
        if self._answer is None or self._answer.lost:
            self._transport, self._answer = await loop.create_connection(Answer, "127.0.0.1", burst.port)
        answer, sent = self._answer, time.perf_counter()
        answer.data, answer.began, answer.done = bytearray(), 0.0, loop.create_future()
        assert self._transport is not None
        self._transport.write(_request(burst, self._rng, self._key))
        whole, now = await answer.done, time.perf_counter()
        status, counted = whole[9:12], self._begin <= now < self._end
        if status == b"200" and b"data: [DONE]" in whole and (tokens := _USAGE.search(whole)):
            if counted:
                report.complete += 1
                report.goodput += int(tokens[1]) / burst.seconds
                report.by_key[self._key] = report.by_key.get(self._key, 0.0) + int(tokens[1]) / burst.seconds
                report.first.append(answer.began - sent)
                report.whole.append(now - sent)
        elif status in (b"429", b"503") and (wait := re.search(rb"retry-after: (\d+)\r\n", whole)):
            report.refused += counted
            report.retry_after.append(int(wait[1]))
            await asyncio.sleep(min(int(wait[1]), burst.patience))
        elif len(report.wrong) < 10:
            report.wrong.append(f"after {now - self._begin:.1f} s: {whole[:300]!r} … {whole[-300:]!r}")


def _request(burst: Burst, rng: random.Random, key: str) -> bytes:
    tokens = rng.randrange(burst.tokens // 2, burst.tokens * 3 // 2 + 1)
    prompt = [rng.randrange(burst.vocab) for _ in range(burst.prompt)]
    body = {
        "model": burst.model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    if key:
        head += f"\r\nAuthorization: Bearer {key}"
    return head.encode() + b"\r\n\r\n" + data


def _ask_health(port: int, end: float, results: Connection) -> None:
    """Every 100 ms, over a new connection each time, as a load balancer does."""
    taken: list[float] = []
    wrong: list[str] = []
    while (now := time.perf_counter()) < end:
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
                connection.request("GET", "/health")
                answer = connection.getresponse()
                if answer.status != 200:
                    wrong.append(f"/health said {answer.status}: {answer.read()[:200]!r}")
        except (OSError, http.client.HTTPException) as error:
            wrong.append(f"/health: {error!r}")
        taken.append(time.perf_counter() - now)
        time.sleep(max(0.0, 0.1 - (time.perf_counter() - now)))
    results.send((taken, wrong[:10]))


async def run_clients(burst: Burst, begin: float, report: Report) -> None:
    """Whoever of them still waits when the time is over is told of, and leaves. No connection is left open."""
    tasks = [asyncio.ensure_future(Client(burst, i, begin, report).run()) for i in range(burst.clients)]
    _, late = await asyncio.wait(tasks, timeout=burst.warm + burst.seconds + burst.grace)
    for task in late:
        report.wrong.append(f"a stream had no end {burst.grace:g} s after the last request")
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    report.wrong += [repr(error) for error in ended if isinstance(error, Exception)]
    await asyncio.sleep(0)  # in which transports that are closed let go of their sockets


def run_burst(burst: Burst) -> Report:
    report, begin = Report(), time.perf_counter() + burst.warm
    mine, theirs = multiprocessing.Pipe()
    with mine, theirs:
        asker = multiprocessing.get_context("fork").Process(
            target=_ask_health, args=(burst.port, begin + burst.seconds, theirs)
        )
        asker.start()
        uvloop.run(run_clients(burst, begin, report))
        report.health, wrong = mine.recv()
        report.wrong += wrong
        asker.join()
        asker.close()
    return report


if __name__ == "__main__":
    print(json.dumps(run_burst(Burst(**json.loads(sys.argv[1]))).as_dict()))
