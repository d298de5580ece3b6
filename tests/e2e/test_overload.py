"""More clients than there is room for, on a real cluster: a stream that waits, refusals, /health, and what is left of
the goodput. The full form is tests/bench/overload.py."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
from burst import Burst, rank, run_burst
from served import Served

ENGINE = {"max_sequences": 2, "max_waiting": 2, "max_batch_tokens": 16}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    cluster = Served({"engine": ENGINE, "attention": {"threads": 1}}, tmp_path_factory.mktemp("served"))
    with cluster:
        yield cluster
    assert cluster.left_over() == {"processes": [], "shared memory": []}


def body(tokens: int) -> dict:
    return {
        "model": "tiny",
        "prompt": "Once",
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }


def test_a_stream_that_waits_has_its_status_line_at_once(served):
    """Two requests take both places for as long as they are read; the third waits behind them."""
    with httpx.Client(base_url=served.url, timeout=120) as client:
        enough = threading.Event()

        def occupy() -> None:
            with client.stream("POST", "/v1/completions", json=body(3500)) as response:
                for _ in response.iter_raw():
                    if enough.is_set():
                        return

        others = [threading.Thread(target=occupy) for _ in range(2)]
        for thread in others:
            thread.start()
        time.sleep(1.0)
        begin = time.monotonic()
        with client.stream("POST", "/v1/completions", json=body(4)) as response:
            status_after = time.monotonic() - begin
            assert response.status_code == 200
            parts = response.iter_raw()
            first = next(parts)
            first_after = time.monotonic() - begin
            enough.set()
            rest = b"".join(parts)
        for thread in others:
            thread.join()
    print(f"status line after {status_after:.2f} s, first bytes {first[:20]!r} after {first_after:.2f} s")
    assert status_after < 2.0
    assert first.startswith(b": waiting") or first_after < 6.0  # 5 s after the status line
    assert rest.endswith(b"data: [DONE]\n\n")


def test_more_than_there_is_room_for(served):
    few = run_burst(Burst(served.port, 4, seconds=5.0, warm=1.0, tokens=32))
    many = run_burst(Burst(served.port, 120, seconds=8.0, warm=2.0, tokens=32, seed=1))
    print(
        f"goodput {few.goodput:.0f} tok/s with 4 clients, {many.goodput:.0f} with 120, of whom {many.refused} were "
        f"refused; /health p99 {rank(many.health, 0.99) * 1e3:.0f} ms"
    )
    assert few.wrong == many.wrong == []
    assert few.refused == 0 < many.refused and min(many.retry_after) >= 1
    assert many.complete and many.goodput > 0.5 * few.goodput, "the machine may be busy with something else"
    assert rank(many.health, 0.99) < 1.0
