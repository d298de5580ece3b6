"""What is said of lost workers, from the controller's operations as they go on."""

from __future__ import annotations

import pytest

from isotherm.cluster.deploy.losses import Losses

PIDS = {"expert-0": 11, "expert-2": 22}
LOST = "expert group expert-0 (process 11) is lost; it is being replaced, and streams that need it wait"


def recovery(phase, *replace, plan=(), reasons=(), number=1, **entered):
    operation = {"id": f"recovery-{number}", "origin": "recovery", "phase": phase, "created": 5.0}
    return operation | {
        "target": {"replace": list(replace)}, "plan": list(plan), "reasons": list(reasons), "entered": entered,
    }  # fmt: skip


def test_a_loss_and_its_end_are_each_said_once():
    losses = Losses(PIDS.get)
    plan = ["start expert-2", "load 32 experts on expert-2", "commit placement version 2", "end expert-0"]
    other = {"id": "op-1", "origin": "api", "phase": "done", "target": {"expert_groups": 3}}
    assert losses.lines([other]) == []
    assert losses.lines([other, recovery("preparing", "expert-0", plan=plan)]) == [LOST]
    assert losses.lines([other, recovery("committing", "expert-0", plan=plan)]) == []
    done = recovery("done", "expert-0", plan=plan, done=6.75)
    whole = "whole again after 1.8 s: expert group expert-2 (process 22) in the place of expert-0"
    assert losses.lines([other, done]) == [whole]
    assert losses.lines([other, done]) == []


def test_one_that_was_over_before_it_was_looked_at_is_said_whole():
    lines = Losses(PIDS.get).lines([recovery("done", "expert-0", plan=["start expert-2"], done=6.0)])
    assert lines[0] == LOST and lines[1].startswith("whole again after 1.0 s: ") and len(lines) == 2


def test_what_cannot_be_replaced_is_taken_over():
    losses = Losses({}.get)
    failed = recovery("rolled_back", "attention-1", plan=["start attention-2"], reasons=["no room"])
    assert losses.lines([failed]) == [
        "attention shard attention-1 is lost; it is being replaced, and streams that need it wait",
        "attention-1 could not be replaced (no room); the others take over what they can, and it is tried again",
    ]
    then = recovery("done", "attention-1", plan=["end attention-1"], number=2, done=8.0)
    assert losses.lines([failed, then]) == ["whole again after 3.0 s: the others have taken over what attention-1 did"]


def test_what_could_not_be_said_is_said_at_the_next_look():
    """Ray's head was away for a moment, and the terminal never told of the loss."""
    answers = iter([ConnectionError("Ray's head is away")])

    def pid_of(worker: str) -> int | None:
        for error in answers:
            raise error
        return PIDS.get(worker)

    losses = Losses(pid_of)
    operations = [recovery("done", "expert-0", plan=["start expert-2"], done=6.0)]
    with pytest.raises(ConnectionError):
        losses.lines(operations)
    assert losses.lines(operations)[0] == LOST and losses.lines(operations) == []
