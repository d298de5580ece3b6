"""The pictures of `isotherm top`: what they say, that they fit, and that a server may come and go."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_admin import FakeAdmin
from fake_engine import FakeEngine, http_server
from rich.console import Console
from starlette.datastructures import Headers

from isotherm.cluster.api import events
from isotherm.cluster.api.app import build_app
from isotherm.cluster.cli import top
from isotherm.cluster.cli.chat import NoServerError
from isotherm.cluster.cli.looks import Sample, looks
from isotherm.cluster.cli.top import RAMP, frame, run_top
from isotherm.cluster.messages.membership import WorkerGoneError

HOSTILE = "[red]x[/] [/nothing]"


def sample(time: float = 10.0, *, rate: float | None = 0.0, groups: int = 2, layers: int = 2, experts: int = 8,
           operation: Any = None, autoscaler: Any = None, hot: float = 1.0,
           speculation: Any = None) -> Sample:  # fmt: skip
    """The first expert of the first layer is asked for `hot` times as often as each other one."""
    names = [f"expert-{i}" for i in range(groups)]
    shard = {"id": "attention-0", "role": "attention", "state": "loaded", "pid": 1, "host": "10.0.0.1", "running": 3,
             "waiting": 2, "tokens": 5, "kv_blocks_used": 5, "kv_blocks": 10,
             "load": None if rate is None else {"tokens_per_second": rate, "first_token_seconds": 0.25}}  # fmt: skip
    if speculation is not None:
        shard["speculation"] = speculation
    workers = [shard] + [
        {"id": g, "role": "expert", "state": "loaded", "pid": 2, "host": "10.0.0.2", "experts": 8,
         "weight_bytes": 1 << 20, "pairs": 7,
         "load": None if rate is None else {"heat": 1.25, "busy": 1.0, "rows_per_second": 2 * rate}} for g in names
    ]  # fmt: skip
    table = [
        {"layer": 3 + i, "rows": [7] * experts, "rate": [hot if i == e == 0 else 1.0 for e in range(experts)],
         "holders": [[names[e * groups // experts]] for e in range(experts)]}
        for i in range(layers)
    ]  # fmt: skip
    status = {
        "controller": {"phase": "serving"},
        "model": {"id": HOSTILE},
        "placement_version": 4,
        "workers": workers,
        "operation": operation,
    }
    return Sample(time, status, {"layers": table, "heat": {g: 1.25 for g in names}}, autoscaler)


def shown(
    now: Sample,
    width: int = 120,
    height: int = 30,
    colours: bool = False,
    trouble: str = "",
) -> str:
    console = Console(width=width, height=height, record=True, file=io.StringIO(),
                      color_system="truecolor" if colours else None, force_terminal=colours)  # fmt: skip
    console.print(frame(now, "http://h:1", width, height, colours, trouble))
    return console.export_text(styles=colours)


def test_what_a_picture_says():
    operation = {
        "id": "op-9",
        "phase": "preparing",
        "progress": 0.5,
        "target": {"expert_groups": 3},
        "origin": "api",
        "waiting": ["expert-2 waits"],
    }
    autoscaler = {"mode": "on", "decisions": [{"kind": "copies", "reason": HOSTILE, "result": "done"}]}
    drafts = {"kind": "ngram", "drafted": 50, "accepted": [20, 5], "gain": 1.0, "why": HOSTILE}
    text = shown(sample(rate=100.0, operation=operation, autoscaler=autoscaler, hot=50.0, speculation=drafts))
    head = (HOSTILE, "serving", "100 tokens/s", "3 running", "2 waiting", "placement 4")
    events = (
        "op-9",
        "━━━━━━━━━━╌",
        "expert_groups 3",
        "expert-2 waits",
        "autoscaler on",
        f"copies (done): {HOSTILE}",
        "expert 0 on expert-0",
        f"attention-0 drafts by ngram: 50% of 50 were right, gain 1.00; {HOSTILE}",
    )
    for words in (*head, *events, "layer 3", "KV 50%", "200 rows/s", "busy 100%", "8 experts, 1.0 MiB"):
        assert words in text, text


def test_80_columns_have_whole_words_only():
    """What there is no room for is left out, rather than cut in its middle."""
    heads = [line for line in shown(sample(rate=12345.0, hot=50.0), width=80, height=24).splitlines() if line]
    assert heads[0].endswith("serving  12345 tokens/s  3 running  2 waiting")
    assert heads[2].startswith("hottest") and heads[2].endswith(("expert-0", "expert-1")), heads[2]
    assert max(map(len, heads)) <= 80


def test_a_worker_that_has_just_come_has_no_rates_yet():
    text = shown(sample(rate=None))
    assert "- tokens/s" in text and "rows/s" not in text and "heat 1" not in text


def test_heat_is_against_the_layer():
    rows = [line for line in shown(sample(hot=50.0), colours=False).splitlines() if line.startswith(("3  ", "4  "))]
    assert rows[0][3] == RAMP[-1] and set(rows[0][4:].rstrip()) <= {RAMP[0], RAMP[1], RAMP[2]}
    assert rows[1][3:].rstrip() == RAMP[round(0.5 * (len(RAMP) - 1))] * 8


def test_a_layer_that_no_group_has_rows_of_has_no_line():
    """A shard may keep the experts of the layer that guesses itself. Before the first request no layer has any."""
    now = sample(layers=3)
    for key in ("rows", "rate"):
        now.experts["layers"][2][key] = [0] * 8
    text = shown(now, width=80)
    assert "heat of 8 experts in 2 layers, 1/8 … 8 × the layer's mean; no rows of layer 5" in text
    assert [line[0] for line in text.splitlines() if line.startswith(("3  ", "4  ", "5  "))] == ["3", "4"]
    for layer in now.experts["layers"]:
        layer["rows"] = layer["rate"] = [0] * 8
    assert "heat of 8 experts in 3 layers" in shown(now) and "no rows" not in shown(now)


def test_a_hot_expert_is_seen_among_many_that_share_a_character():
    now = sample(groups=144, layers=58, experts=256, hot=500.0)
    text = shown(now, width=80, height=24)
    rows = text.splitlines()[-8:]
    assert any(row.startswith(" 3  " + RAMP[-1]) for row in rows), text
    assert "more" in text and "heat of 256 experts in 58 layers" in text


@pytest.mark.parametrize("size", [(200, 60), (120, 30), (80, 24), (40, 12), (20, 8)])
@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("big", [False, True])
def test_it_fits(size: tuple[int, int], colours: bool, big: bool):
    width, height = size
    drafts = {"kind": "ngram", "drafted": 50, "accepted": [20, 5], "gain": 1.0, "why": "because " * 30}
    now = sample(groups=144, layers=58, experts=256, speculation=drafts) if big else sample(speculation=drafts)
    console = Console(width=width, height=height, color_system="truecolor" if colours else None, force_terminal=colours)
    with console.capture() as capture:
        console.print(frame(now, "http://h:1", width, height, colours, "as it was 3 s ago: no answer"))
    text = capture.get()
    lines = text.splitlines()
    assert len(lines) <= max(height, 9), text
    if not colours:
        assert max(map(len, lines)) <= width, text


def test_a_model_without_experts_and_a_cluster_that_starts():
    now = sample(groups=1, layers=0)
    now.status["workers"] = [{"id": "attention-0", "role": "attention", "state": "loading", "progress": 0.25}]
    now.status["placement_version"] = None
    text = shown(now)
    assert "25%" in text and "placement -" in text and "heat of" not in text


def told(given: Sample) -> FakeAdmin:
    """An operator's side whose event stream tells a sample."""
    admin = FakeAdmin()
    admin.feed.put("cluster", {name: given.status[name] for name in ("controller", "model", "placement_version")})
    admin.feed.replace("worker/", {worker["id"]: worker for worker in given.status["workers"]})
    for layer in given.experts["layers"]:
        number = layer["layer"]
        admin.feed.put(f"layer/{number}", {"layer": number, "holders": layer["holders"], "pinned": []})
        admin.feed.put(f"heat/{number}", {"rate": layer["rate"], "rows": layer["rows"]})
    admin.feed.put("heat/groups", given.experts["heat"])
    return admin


class Watched:
    """An application, and the requests that it has had."""

    def __init__(self, admin: FakeAdmin) -> None:
        self.engine = FakeEngine(100)
        self.app = build_app(self.engine, None, "m", admin=admin)  # type: ignore[arg-type]
        self.asked: list[tuple[str, str | None]] = []  # path and Last-Event-ID

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            self.asked.append((scope["path"], Headers(scope=scope).get("last-event-id")))
        await self.app(scope, receive, send)


class Console80(Console):
    def __init__(self, **options: Any) -> None:
        super().__init__(width=80, height=24, file=io.StringIO(), **options)


def test_one_picture_for_a_script_is_the_event_streams():
    given = sample(rate=0.0)
    with http_server(app := Watched(told(given))) as url:
        console = Console80(record=True)
        run_top(url, 0.1, True, console)
    text = console.export_text()
    assert app.asked == [("/admin/events", None)]
    assert "0 tokens/s" in text and "heat of 8 experts in 2 layers" in text and "asking" not in text
    with pytest.raises(NoServerError, match="isotherm serve"):
        run_top(url, 0.1, True, console)


def test_where_the_event_stream_is_full_the_server_is_asked(monkeypatch):
    monkeypatch.setattr(events, "MAX_STREAMS", 0)
    given = sample()
    admin = told(given)
    admin.experts = answer(given.experts)  # type: ignore[method-assign]
    app = Watched(admin)
    app.engine.status = answer(given.status)  # type: ignore[method-assign]
    with http_server(app) as url:
        console = Console(width=160, record=True, file=io.StringIO())
        run_top(url, 0.5, True, console)
    text = console.export_text()
    assert "asking every 0.5 s; the event stream cannot be read: HTTP 429: 0 event streams are open" in text
    assert [path for path, _ in app.asked] == ["/admin/events", "/admin/autoscaler", "/status", "/admin/experts"]


def answer(value: Any) -> Any:
    async def answered() -> Any:
        return value

    return answered


def test_a_server_that_is_away_for_a_while_and_an_interrupt(monkeypatch):
    """The stream is taken up where it broke off."""
    admin, pictures = told(sample()), [""]
    app = Watched(admin)

    def watched(now: Sample, url: str, width: int, height: int, colours: bool, trouble: str):
        pictures.append(trouble)
        return frame(now, url, width, height, colours, trouble)

    def shown_until(what: Any) -> None:
        deadline = time.monotonic() + 20
        while not what(pictures[-1]):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def script(*given: Any) -> Iterator[Sample | str]:
        found = looks(*given)
        first = next(found)
        assert isinstance(first, Sample)
        yield first
        admin.fails = WorkerGoneError("the controller is away")
        trouble = next(found)
        assert isinstance(trouble, str) and "away" in trouble
        yield trouble
        shown_until(lambda words: "s ago: " in words and "away" in words)
        admin.fails = None
        admin.feed.put("cluster", {**first.status, "placement_version": 5})
        yield (last := next(sample for sample in found if isinstance(sample, Sample)))
        assert last.status["placement_version"] == 5 and last.status["workers"] == first.status["workers"]
        shown_until(lambda words: words == "")
        raise KeyboardInterrupt

    monkeypatch.setattr(top, "frame", watched)
    monkeypatch.setattr(top, "looks", script)
    with http_server(app) as url:
        run_top(url, 0.1, False, Console80(force_terminal=True))
    paths, ids = zip(*app.asked, strict=True)
    assert set(paths) == {"/admin/events"} and ids[0] is None and None not in ids[1:]
