"""What is said of a worker, wherever it is shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from isotherm.cluster.cli.worker_table import WorkerLine, line_of, speculation_lines, totals, worker_table

SHARD = {"id": "attention-0", "state": "loaded", "host": "h", "running": 3, "waiting": 1, "kv_blocks_used": 5,
         "kv_blocks": 100, "load": {"tokens_per_second": 140.4, "first_token_seconds": 0.25}}  # fmt: skip
GROUP = {"id": "expert-0", "state": "loaded", "host": "h", "experts": 32, "weight_bytes": 1 << 20, "pairs": 9,
         "load": {"heat": 1.5, "busy": 0.25, "rows_per_second": 4000.0}}  # fmt: skip


@pytest.mark.parametrize(
    ("worker", "line"),
    [
        (SHARD, WorkerLine("attention-0", "h", "3 running, 1 waiting", "140 tokens/s", "KV 5%")),
        (GROUP, WorkerLine("expert-0", "h", "heat 1.50, busy 25%", "4000 rows/s", "32 experts, 1.0 MiB")),
        (GROUP | {"load": None}, WorkerLine("expert-0", "h", "", "", "32 experts, 1.0 MiB")),
        ({"id": "a", "state": "loading", "progress": 0.5}, WorkerLine("a", "", "loading, 50%", "", "")),
        (
            {"id": "a", "state": "loading", "progress": 0.5, "read_bytes": 3 << 30, "read_bytes_per_second": 1 << 20},
            WorkerLine("a", "", "loading, 50%", "1.0 MiB/s", "3.0 GiB read"),
        ),
        ({"id": "a", "state": "dead", "reason": "killed"}, WorkerLine("a", "", "dead: killed", "", "", trouble=True)),
    ],
)
def test_a_worker_in_a_line(worker, line):
    assert line_of(worker) == line


def test_hosts_are_shown_where_they_differ():
    def shown(*workers, width: int = 80) -> str:
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(worker_table(workers, width, left_out=3))
        return console.export_text()

    assert "host" not in shown(SHARD, GROUP) and "… 3 more" in shown(SHARD)
    assert "other" in shown(SHARD, GROUP | {"host": "other"})
    assert "other" not in shown(SHARD, GROUP | {"host": "other"}, width=70), "the rest comes first"


def test_totals_are_those_of_the_shards():
    second = SHARD | {"load": {"tokens_per_second": 60.0, "first_token_seconds": 1.5}}
    assert totals([SHARD, second, GROUP]) == "200 tokens/s  6 running  2 waiting  first token 1.50 s"
    assert totals([SHARD | {"load": None}]) == "- tokens/s  3 running  1 waiting"


def test_what_speculation_came_to_at_each_shard_that_has_it():
    found = {"kind": "mtp", "drafted": 200, "tried": [100, 62], "accepted": [90, 34], "steps": 100, "gain": 1.314,
             "why": "90% of first drafts are right"}  # fmt: skip
    begun = found | {"drafted": 0, "accepted": [0, 0], "gain": 1.0, "why": "nothing was decided yet"}
    assert list(speculation_lines([SHARD | {"speculation": found}, SHARD, GROUP, SHARD | {"speculation": begun}])) == [
        "attention-0 drafts by mtp: 62% of 200 were right, gain 1.31; 90% of first drafts are right",
        "attention-0 drafts by mtp: none yet, gain 1.00; nothing was decided yet",
    ]
