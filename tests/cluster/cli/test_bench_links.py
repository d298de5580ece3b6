"""`isotherm bench links`: every kind of link is measured, with the messages that were asked for, and the other process
is gone afterwards."""

from __future__ import annotations

import json
import multiprocessing
import sys
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from isotherm.cluster.cli import bench_links
from isotherm.cluster.cli.bench import app
from isotherm.cluster.cli.bench_links import LinkShape
from isotherm.kernels.native import library as native_library

SHAPE = ("--hidden", "64", "--experts", "8", "--top-k", "2")


@pytest.mark.slow
def test_every_kind_of_link_is_measured():
    result = CliRunner().invoke(app, ["links", *SHAPE, "--rows", "1,5", "--trips", "7", "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads(result.stdout)
    figures: list[dict[str, Any]] = report["figures"]
    built = native_library.built_library() is not None and sys.platform == "linux"
    shared = ["shared-memory", "shared-memory (Python loop)"] if built else []
    assert ("no_shared_memory" in report) == (not shared)
    assert list(dict.fromkeys(f["name"] for f in figures)) == ["in-process", *shared, "process-group (gloo)"]
    for name in {f["name"] for f in figures}:
        assert [(f["rows"], f["pairs"]) for f in figures if f["name"] == name] == [(1, 2), (5, 10)]
    for f in figures:
        assert 0 < f["microseconds"] <= f["p99_microseconds"]
        assert f["mb_per_s"] == pytest.approx((f["rows"] + f["pairs"]) * 64 * 2 / f["microseconds"])
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_peer_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch):
    # Pickled by name: it returns at once, and its end of the pipe is closed
    monkeypatch.setattr(bench_links, "_serve", print)
    with pytest.raises(ConnectionError, match="ended before it could be met"):
        bench_links.bench_links(LinkShape(64, 8, 2, torch.float32), [1], 1)
    assert not multiprocessing.active_children()


def test_more_experts_per_row_than_there_are_is_refused():
    result = CliRunner().invoke(app, ["links", "--experts", "4", "--top-k", "5"])
    assert result.exit_code == 2 and "--top-k is 5; there are 4 experts" in result.output
