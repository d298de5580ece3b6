"""A cluster as its event stream tells it, from bytes in any cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from isotherm.cluster.client.errors import ConnectionFailedError, StreamBrokenError
from isotherm.cluster.client.feed import FeedReader


def event(kind: str, number: int, values: dict[str, Any], gone: tuple[str, ...] = ()) -> bytes:
    return f"id: e:{number}\nevent: {kind}\ndata: {json.dumps({'set': values, 'gone': gone})}\n\n".encode()


SNAPSHOT = event("snapshot", 1, {
    "cluster": {"model": {"id": "m"}, "controller": {"phase": "serving"}, "placement_version": 2},
    "worker/a": {"id": "a"}, "node/n": {"id": "n"},
    "layer/2": {"layer": 2, "holders": [["g"]], "pinned": []},
    "layer/1": {"layer": 1, "holders": [["g"]], "pinned": []},
    "heat/1": {"rate": [3.0], "rows": [7]}, "heat/2": {"rate": [1.0], "rows": [5]}, "heat/groups": {"g": 1.0},
    "operation/op-1": {"id": "op-1", "phase": "preparing", "created": 5.0, "dry_run": False},
    "autoscaler": {"mode": "on"}, "decision/2.0": {"time": 2.0}, "decision/1.0": {"time": 1.0},
})  # fmt: skip


@pytest.mark.parametrize("cut", [1, 7, 10_000])
def test_a_state_from_any_cut(cut: int):
    reader = FeedReader("http://h")
    stream = b": waiting\n\n" + SNAPSHOT + event("change", 2, {"worker/b": {"id": "b"}}, ("worker/a",))
    states = [len(s.values) for at in range(0, len(stream), cut) for s in reader.feed(stream[at : at + cut])]
    assert len(states) == 2 and reader.headers == {"last-event-id": "e:2"}
    state = reader.state
    assert state.status()["workers"] == [{"id": "b"}] and state.status()["operation"]["id"] == "op-1"
    assert [(layer["layer"], layer["rate"]) for layer in state.experts()["layers"]] == [(1, [3.0]), (2, [1.0])]
    autoscaler = state.autoscaler()
    assert autoscaler is not None and [d["time"] for d in autoscaler["decisions"]] == [1.0, 2.0]
    list(reader.feed(event("snapshot", 3, {"cluster": {}})))
    assert state.values == {"cluster": {}} and state.autoscaler() is None and state.status()["operation"] is None


def test_what_is_no_part():
    for data in (b"data: {\n\n", b'data: {"set": 5, "gone": []}\n\n', b"data: [1]\n\n"):
        with pytest.raises(StreamBrokenError, match="not in its form"):
            list(FeedReader("http://h").feed(data))
    with pytest.raises(StreamBrokenError, match="away"):
        list(FeedReader("http://h").feed(b'event: error\ndata: {"error": {"message": "away"}}\n\n'))


def test_pauses_grow_until_something_comes():
    reader = FeedReader("http://h")
    with pytest.raises(ConnectionFailedError, match="http://h: gone"):
        reader.broken(OSError("gone"))
    list(reader.feed(SNAPSHOT))
    assert [reader.broken(OSError("gone")) for _ in range(7)] == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert "gone" in reader.state.trouble
    list(reader.feed(event("change", 2, {})))
    assert reader.state.trouble == "" and reader.broken(None) == 0.25
