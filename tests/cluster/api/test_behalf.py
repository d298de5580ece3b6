"""What the engine is told of who asks: keys, and rows of a batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from starlette.requests import Request

from isotherm.cluster.api.access.caller import Caller
from isotherm.cluster.api.behalf import claim_for, on_behalf
from isotherm.cluster.api.prepare import Prepared
from isotherm.cluster.engine.places import Band, Claim
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams

KEY = Caller("team", tenant="team", weight=3.0, priority=2)


def asked(caller=None, in_process=None):
    state = {"caller": caller} if caller else {}
    return Request({"type": "http", "state": state | ({} if in_process is None else {"priority": in_process})})


def told(request, priority=None, shared=False):
    body = SimpleNamespace(priority=priority)
    first = GenerationRequest("r", (1,), SamplingParams(1), priority=priority or 0)
    prepared = Prepared("r", body, (first, first), (), None, None)  # type: ignore[arg-type]
    one, other = on_behalf(prepared, request, shared).requests
    assert one == other
    return one.priority, one.key, one.weight, one.tenant


def test_without_keys_nobody_has_a_share_of_its_own():
    assert told(asked(), -3) == (-3, "", 1.0, "")
    assert claim_for(asked()) == Claim()


def test_behind_a_key_it_is_the_keys():
    assert told(asked(KEY)) == (2, "team", 3.0, "team")
    assert claim_for(asked(KEY)) == Claim("team", 3.0, Band.BACKGROUND)


@pytest.mark.parametrize(("said", "given"), [(None, 2), (-5, 2), (2, 2), (7, 7)])
def test_nobody_comes_before_his_keys_own_priority(said, given):
    assert told(asked(KEY), said)[0] == given


def test_a_switch_has_all_keys_share_one_cache():
    assert told(asked(KEY), shared=True)[3] == ""


def test_rows_of_a_batch_come_last_unless_they_say_otherwise():
    assert told(asked(in_process=1000)) == (1000, "", 1.0, "")
    assert told(asked(in_process=1000), 5)[0] == 5
    assert told(asked(KEY, 1000)) == (1000, "team", 3.0, "team")
    assert told(asked(KEY, 1000), 0)[0] == 2
    assert claim_for(asked(KEY, 1000)).band is Band.BACKGROUND
