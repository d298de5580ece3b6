"""The pictures of `isotherm top`: what they say, that they fit, and that a server may come and go."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest
from fake_engine import http_server
from rich.console import Console

from isotherm.cluster.cli import top
from isotherm.cluster.cli.chat import NoServerError
from isotherm.cluster.cli.top import RAMP, Sample, frame, run_top
from isotherm.cluster.client import APIError

HOSTILE = "[red]x[/] [/nothing]"


def sample(time: float = 10.0, *, rate: float | None = 0.0, groups: int = 2, layers: int = 2, experts: int = 8,
           operation: Any = None, autoscaler: Any = None, hot: float = 1.0) -> Sample:  # fmt: skip
    """The first expert of the first layer is asked for `hot` times as often as each other one."""
    names = [f"expert-{i}" for i in range(groups)]
    shard = {"id": "attention-0", "role": "attention", "state": "loaded", "pid": 1, "host": "10.0.0.1", "running": 3,
             "waiting": 2, "tokens": 5, "kv_blocks_used": 5, "kv_blocks": 10,
             "load": None if rate is None else {"tokens_per_second": rate, "first_token_seconds": 0.25}}  # fmt: skip
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
    text = shown(sample(rate=100.0, operation=operation, autoscaler=autoscaler, hot=50.0))
    head = (HOSTILE, "serving", "100 tokens/s", "3 running", "2 waiting", "placement 4")
    events = (
        "op-9",
        "━━━━━━━━━━╌",
        "expert_groups 3",
        "expert-2 waits",
        "autoscaler on",
        f"copies, {HOSTILE} (done)",
        "expert 0 on expert-0",
    )
    for words in (*head, *events, "layer 3", "KV 50%", "200 rows/s", "busy 100%", "8 experts, 1.0 MiB"):
        assert words in text, text


def test_a_worker_that_has_just_come_has_no_rates_yet():
    text = shown(sample(rate=None))
    assert "- tokens/s" in text and "rows/s" not in text and "heat 1" not in text


def test_heat_is_against_the_layer():
    rows = [line for line in shown(sample(hot=50.0), colours=False).splitlines() if line.startswith(("3  ", "4  "))]
    assert rows[0][3] == RAMP[-1] and set(rows[0][4:].rstrip()) <= {RAMP[0], RAMP[1], RAMP[2]}
    assert rows[1][3:].rstrip() == RAMP[round(0.5 * (len(RAMP) - 1))] * 8


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
    now = sample(groups=144, layers=58, experts=256) if big else sample()
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


class Server:
    """Answers the three routes from a sample; `gone` as a controller that is away, `autoscaler` None as a server that
    has none."""

    def __init__(self, given: Sample):
        self.sample, self.gone, self.asked = given, False, 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        self.asked += 1
        body = {
            "/status": self.sample.status,
            "/admin/experts": self.sample.experts,
            "/admin/autoscaler": self.sample.autoscaler,
        }.get(scope["path"])
        status = 503 if self.gone else 404 if body is None else 200
        body = {"error": {"message": "away"}} if status != 200 else body
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
        )
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def test_one_picture_for_a_script():
    server = Server(sample(rate=0.0))
    with http_server(server) as url:
        console = Console(width=100, record=True, file=io.StringIO())
        run_top(url, 0.1, True, console, sleep=lambda seconds: None)
        assert "0 tokens/s" in console.export_text() and server.asked == 3
    with pytest.raises(NoServerError, match="isotherm serve"):
        run_top(url, 0.1, True, console)


def test_a_server_that_is_away_for_a_while_and_an_interrupt(monkeypatch):
    server = Server(sample())
    pictures: list[str] = []
    real = frame

    def watched(now: Sample, url: str, width: int, height: int, colours: bool, trouble: str):
        pictures.append(trouble)
        return real(now, url, width, height, colours, trouble)

    monkeypatch.setattr(top, "frame", watched)
    turns = 0

    def sleep(seconds: float) -> None:
        nonlocal turns
        turns += 1
        server.gone = turns == 2
        # Pictures are drawn a few times a second: until one has been that shows the trouble, and one without it.
        while (turns == 3 and not any(pictures)) or (turns == 4 and pictures[-1]):
            time.sleep(0.01)
        if turns == 4:
            raise KeyboardInterrupt

    with http_server(server) as url:
        run_top(url, 0.1, False, Console(width=80, height=24, force_terminal=True, file=io.StringIO()), sleep)
    assert any("away" in trouble for trouble in pictures) and pictures[-1] == ""
    with http_server(Server(Sample(0.0, None, None, None))) as url, pytest.raises(APIError):
        run_top(url, 0.1, True, Console(file=io.StringIO()))
