"""What is counted of requests that have ended."""

from __future__ import annotations

from request_records import record

from isotherm.cluster.messages.figures import OTHER, Buckets
from isotherm.cluster.observe import request_figures as f


def read(*records):
    figures = f.RequestFigures()
    for one in records:
        figures.take(one)
    return {family.metric: family.values for family in figures.read()}


def test_a_request_that_went_well():
    found = read(record(moved=2, resumed=1))
    chat = "chat", "tiny"
    assert found[f.REQUESTS] == {("alice", "/v1/chat/completions"): 1}
    assert found[f.ERRORS] == {} and found[f.FINISHED] == {("stop",): 1}
    assert found[f.TOKENS] == {("alice", "input"): 20, ("alice", "cached"): 16, ("alice", "output"): 11}
    assert found[f.DURATION][(*chat, "")].total == 1.51 and found[f.FIRST_TOKEN][chat].total == 0.51
    assert found[f.PER_TOKEN][chat].total == 0.1, "1 s for the ten tokens after the first"
    assert found[f.TOKEN_USAGE][(*chat, "output")].total == 11
    assert [found[m][()].total for m in (f.QUEUE, f.PREFILL, f.DECODE)] == [0.2, 0.3, 1.0]
    assert found[f.SECONDS] == {("alice", "queue"): 0.2, ("alice", "prefill"): 0.3, ("alice", "decode"): 1.0}
    assert found[f.MOVED] == {(): 2} and found[f.RESUMED] == {(): 1}


def test_refused_ones_have_no_latencies():
    found = read(record(status=429, error="overloaded", first_token=None, model="", prompt_tokens=0, output_tokens=0,
                        finish_reasons=(), choices=0))  # fmt: skip
    assert found[f.ERRORS] == {("alice", "overloaded"): 1}
    assert found[f.DURATION][("chat", "", "overloaded")].count == 1
    assert found[f.FIRST_TOKEN] == found[f.TOKEN_USAGE] == found[f.TOKENS] == {}
    assert found[f.QUEUE] == {(): Buckets((0,) * (len(f.QUEUE.bounds) + 1), 0.0)}


def test_operations_are_told_apart_and_one_token_has_no_time_per_token():
    found = read(record(route="/v1/completions", output_tokens=1), record(route="/v1/messages"))
    assert set(found[f.FIRST_TOKEN]) == {("text_completion", "tiny"), ("chat", "tiny")}
    assert set(found[f.PER_TOKEN]) == {("chat", "tiny")}


def test_keys_beyond_the_bound_share_a_series():
    found = read(*(record(key=f"key-{i}") for i in range(f.KEYS + 7)))
    keys = {key for key, _ in found[f.REQUESTS]}
    assert len(keys) == f.KEYS + 1 and found[f.REQUESTS][(OTHER, "/v1/chat/completions")] == 7
