"""What Ray's processes on a node were started with."""

from __future__ import annotations

import os

import pytest

from isotherm.cluster.doctor.environment import judge_environment, look_at_environment
from isotherm.cluster.doctor.finding import State
from isotherm.cluster.on_ray.environment import NODE_ENVIRONMENT

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def test_it_is_read_from_the_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", {**NODE_ENVIRONMENT, "RAY_ADDRESS": "a:1"})
    assert look_at_environment() == NODE_ENVIRONMENT
    assert [f.state for f in judge_environment(look_at_environment())] == [State.OK]


def test_without_the_front_doors_middlewares_it_will_not_work():
    (found,) = judge_environment({name: value for name, value in NODE_ENVIRONMENT.items() if name != CALLBACK})
    assert found.state is State.FAIL and f"{CALLBACK} is not isotherm.cluster" in found.words
    assert "docs/operations.md" in found.advice


def test_another_value_is_told_with_the_right_one():
    (found,) = judge_environment({**NODE_ENVIRONMENT, "RAY_SERVE_PROXY_USE_GRPC": "0"})
    assert found.state is State.WARN and "RAY_SERVE_PROXY_USE_GRPC is 0, not 1" in found.words


def test_what_makes_it_slower_or_less_safe_is_a_warning():
    (found,) = judge_environment({**NODE_ENVIRONMENT, "RAY_worker_niceness": "15", "RAY_AUTH_MODE": "disabled"})
    assert found.state is State.WARN and "RAY_worker_niceness" in found.words and "RAY_AUTH_MODE" in found.words


def test_whether_ray_tells_its_makers_anything_is_its_users_affair():
    (found,) = judge_environment({name: v for name, v in NODE_ENVIRONMENT.items() if "USAGE_STATS" not in name})
    assert found.state is State.OK
