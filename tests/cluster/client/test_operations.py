from __future__ import annotations

from isotherm.cluster.client.operations import OperationEvents


def operation(name, **entered):
    return {"id": name, "phase": list(entered)[-1], "entered": entered}


def test_each_phase_is_told_once_and_in_order():
    events = OperationEvents()
    assert events.new([operation("op-1", planned=1.0)]) == []  # what was before
    one = operation("op-1", planned=1.0, preparing=2.0, committing=4.0)
    two = operation("op-2", planned=3.0)
    found = events.new([one, two])
    assert [(e.id, e.phase, e.time) for e in found] == [
        ("op-1", "preparing", 2.0),
        ("op-2", "planned", 3.0),
        ("op-1", "committing", 4.0),
    ]
    assert found[0].operation is one and events.new([one, two]) == []


def test_a_cluster_that_was_started_anew_counts_from_the_beginning():
    events = OperationEvents()
    events.new([operation("op-1", planned=1.0)])
    assert [e.time for e in events.new([operation("op-1", planned=9.0)])] == [9.0]
