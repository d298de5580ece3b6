from __future__ import annotations

from typing import get_args

import pytest

from isotherm.cluster.client import params
from isotherm.cluster.messages.operations import (
    AUTOSCALER,
    HISTORY,
    AutoscalerMode,
    Operation,
    OperationError,
    OperationLog,
    Phase,
    parse_operation,
)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body"), ([], "body"), ("x", "body"), (None, "body"),
        ({"expert_groups": 0}, "expert_groups"), ({"expert_groups": True}, "expert_groups"),
        ({"expert_groups": "3"}, "expert_groups"), ({"attention_shards": 1.5}, "attention_shards"),
        ({"copies": [{"layer": 1}]}, "copies.0.expert"),
        ({"copies": [{"layer": -1, "expert": 0, "count": 1}]}, "copies.0.layer"), ({"groups": 3}, "groups"),
        ({"copies": [{"layer": 1, "expert": 0}]}, "copies.0.count"),
        ({"copies": [{"layer": 1, "expert": 0, "count": 0}]}, "copies.0.count"),
        ({"copies": [{"layer": 1, "expert": 0, "count": "auto"}]}, "copies.0.count"),
        ({"copies": [{"layer": 1, "expert": 0, "count": n} for n in (2, 1)]}, "copies"),
        ({"drain_nodes": ["a b"]}, "drain_nodes.0"), ({"drain_nodes": "ab"}, "drain_nodes"),
        ({"expert_groups": 2, "deadline_seconds": 0}, "deadline_seconds"),
        ({"expert_groups": 2, "dry_run": "yes"}, "dry_run"),
        ({"expert_groups": 2, "idempotency_key": "k" * 201}, "idempotency_key"),
    ],
)  # fmt: skip
def test_bad_bodies_name_the_field(body, field):
    with pytest.raises(OperationError) as error:
        parse_operation(body)
    assert error.value.field == field


def opened(log: OperationLog, **body):
    return log.open(parse_operation({"expert_groups": 3} | body), now=1.0)


def test_what_is_no_nodes_id_is_shown_with_where_these_are():
    with pytest.raises(OperationError, match="got 'node-1'; `isotherm status` shows the IDs of nodes"):
        parse_operation({"drain_nodes": ["node-1"]})


def test_what_is_no_absolute_path_is_told_so():
    with pytest.raises(OperationError, match="model: .*got 'tiny'; it must be a checkpoint's absolute path"):
        parse_operation({"model": "tiny"})


def test_what_was_only_looked_at_can_still_be_done():
    """With the key of the dry run: it was refused as if it had been used for another target."""
    log = OperationLog()
    looked, _ = opened(log, idempotency_key="a", dry_run=True)
    looked.enter(Phase.DONE, 2.0)
    done, new = opened(log, idempotency_key="a")
    assert new and done is not looked
    assert opened(log, idempotency_key="a", dry_run=True) == (looked, False)
    assert opened(log, idempotency_key="a") == (done, False)


def test_a_key_used_again_is_the_same_operation():
    log = OperationLog()
    first, new = opened(log, idempotency_key="a")
    assert new
    assert opened(log, idempotency_key="a") == (first, False)
    first.enter(Phase.DONE, 2.0)
    assert opened(log, idempotency_key="a") == (first, False)
    with pytest.raises(OperationError, match="another target"):
        opened(log, idempotency_key="a", expert_groups=4)


def test_a_number_of_copies_that_is_handed_back_is_told_as_it_was_asked():
    copies = [{"layer": 1, "expert": 2, "count": None}, {"layer": 1, "expert": 3, "count": 2}]
    log = OperationLog()
    operation, _ = log.open(parse_operation({"copies": copies}), now=1.0)
    assert operation.as_dict()["target"] == {"copies": copies}
    back = OperationLog.load(log.dump(), now=2.0).get(operation.id)
    assert back is not None and back.target == {"copies": copies}


def test_one_runs_at_a_time_and_dry_runs_do_not_count():
    log = OperationLog()
    dry, _ = opened(log, dry_run=True)
    first, _ = opened(log)
    with pytest.raises(OperationError) as error:
        opened(log, expert_groups=2)
    assert error.value.conflict
    opened(log, dry_run=True)
    first.enter(Phase.ROLLING_BACK, 2.0)
    first.enter(Phase.ROLLED_BACK, 3.0, "no room")
    second, new = opened(log, expert_groups=2)
    assert new and second.id not in (first.id, dry.id)


def test_an_ended_operation_stays_ended():
    log = OperationLog()
    operation, _ = opened(log)
    operation.enter(Phase.PREPARING, 2.0)
    operation.enter(Phase.DONE, 5.0)
    assert operation.as_dict()["seconds"] == {"planned": 1.0, "preparing": 3.0} and operation.progress == 1.0
    with pytest.raises(OperationError, match="has ended"):
        operation.enter(Phase.ROLLING_BACK, 6.0)


def test_history_survives_a_restart_and_is_bounded():
    log = OperationLog()
    for i in range(HISTORY + 30):
        operation, _ = opened(log, idempotency_key=str(i))
        operation.enter(Phase.DONE, 2.0)
    running, _ = opened(log)
    committed = Operation("recovery-1", {}, "recovery", 1.0, phase=Phase.COMMITTING, committed=True)
    log.record(committed)
    assert len(log.all()) <= HISTORY + 2
    back = OperationLog.load(log.dump(), now=9.0)
    assert [o.id for o in back.all()] == [o.id for o in log.all()]
    assert back.get(running.id).phase is Phase.ROLLED_BACK and "restarted" in back.get(running.id).reasons[-1]
    assert back.get(committed.id).phase is Phase.DONE
    assert opened(back)[0].id not in {o.id for o in log.all()}


def test_the_autoscalers_operations_push_no_others_out():
    log = OperationLog()
    mine, _ = log.open(parse_operation({"expert_groups": 3, "idempotency_key": "mine"}), 0.0)
    mine.enter(Phase.DONE, 1.0)
    for i in range(3 * HISTORY):
        operation, _ = log.open(parse_operation({"expert_groups": 3}), float(i), AUTOSCALER)
        operation.enter(Phase.DONE, float(i))
        recovery = Operation(f"recovery-{i}", {}, "recovery", float(i), phase=Phase.DONE)
        log.record(recovery)
    assert log.get(mine.id) is mine
    assert log.open(parse_operation({"expert_groups": 3, "idempotency_key": "mine"}), 9.0) == (mine, False)
    assert len(log.all()) <= 2 * HISTORY + 3


def test_how_operations_ended_is_counted_for_ever():
    log = OperationLog()
    for i in range(HISTORY + 5):
        operation, _ = opened(log)
        operation.enter(Phase.ROLLED_BACK if i % 2 else Phase.DONE, 2.0)
    dry, _ = opened(log, dry_run=True)
    dry.enter(Phase.DONE, 2.0)
    opened(log)
    counts = {("api", "done"): (HISTORY + 6) // 2, ("api", "rolled_back"): (HISTORY + 5) // 2}
    assert log.ended() == counts and log.open_count() == 1
    again = OperationLog.load(log.dump(), now=3.0)
    assert again.ended() == counts | {("api", "rolled_back"): counts["api", "rolled_back"] + 1}
    assert again.open_count() == 0


def test_the_client_has_the_same_phases_and_modes():
    """It is installed without the cluster's modules, and so has names of its own."""
    assert set(get_args(params.Phase)) == {phase.value for phase in Phase}
    assert {phase.value for phase in Phase if phase.is_final} == params.FINAL_PHASES
    assert get_args(params.AutoscalerMode) == get_args(AutoscalerMode)
