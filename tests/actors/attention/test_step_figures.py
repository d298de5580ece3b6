"""What a shard's steps were like, in buckets."""

from __future__ import annotations

from types import SimpleNamespace

from isotherm.actors.attention import step_figures as f
from isotherm.actors.attention.step_figures import StepFigures
from isotherm.cluster.messages.meters import SpeculationMeter


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


def test_what_speculation_came_to_is_told():
    scheduler = SimpleNamespace(preemptions=0, looked_up=0, found=0)
    meter = SpeculationMeter("mtp", drafted=9, tried=(4, 3), accepted=(3, 2), steps=4, gain=1.25, why="it pays")
    for speculation, expected in ((SimpleNamespace(meter=lambda: meter), (9, 5, 1.25)), (None, (0, 0, 1.0))):
        read = {family.metric: family.values[()] for family in StepFigures().read(scheduler, speculation)}  # type: ignore[arg-type]
        assert (read[f.DRAFTED], read[f.ACCEPTED], read[f.GAIN]) == expected
