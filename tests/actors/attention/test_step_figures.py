"""What a shard's steps were like, in buckets."""

from __future__ import annotations

from types import SimpleNamespace

from isotherm.actors.attention import step_figures as f
from isotherm.actors.attention.step_figures import StepFigures


def test_a_step_is_counted_once_in_each_histogram():
    figures = StepFigures()
    chunks = [SimpleNamespace(count=1), SimpleNamespace(count=300)]
    figures.add(chunks, 0.003, 0.0015)  # type: ignore[arg-type]
    figures.add(chunks[:1], 100.0, 0.0)  # type: ignore[arg-type]
    scheduler = SimpleNamespace(preemptions=2, looked_up=40, found=32)
    read = {family.metric: family.values[()] for family in figures.read(scheduler)}  # type: ignore[arg-type]
    assert tuple(read) == f.METRICS
    assert read[f.STEP_SECONDS].total == 100.003 and read[f.STEP_SECONDS].counts[-1] == 1
    assert (read[f.STEP_REQUESTS].total, read[f.STEP_TOKENS].total, read[f.EXCHANGE_WAIT].total) == (3, 302, 0.0015)
    assert read[f.STEP_SECONDS].counts[f.STEP_SECONDS.bounds.index(0.004)] == 1
    assert (read[f.PREEMPTIONS], read[f.LOOKUPS], read[f.HITS]) == (2, 40, 32)
