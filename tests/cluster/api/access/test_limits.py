from __future__ import annotations

from typing import Any

import pytest

from isotherm.cluster.api.access.caller import ANYONE, Caller, KeyLimits
from isotherm.cluster.api.access.limits import allowed_models, check_limits, most_tokens
from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.completion import CompletionBody
from isotherm.cluster.api.errors import ReplyError


def caller(priority: int = 0, **limits: Any) -> Caller:
    return Caller("ann", priority=priority, limits=KeyLimits(**limits))


def chat(**fields: Any) -> ChatBody:
    return ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})


def completion(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"model": "m", "prompt": "x", **fields})


@pytest.mark.parametrize(
    ("who", "body", "param"),
    [
        (caller(n=2), chat(n=3), "n"),
        (caller(n=2), completion(n=1, best_of=3), "best_of"),
        (caller(streams=2), chat(n=3), "n"),
        (caller(max_tokens=10), chat(max_tokens=11), "max_tokens"),
        (caller(max_tokens=10), chat(max_completion_tokens=11), "max_completion_tokens"),
        (caller(max_tokens=10), completion(max_tokens=11), "max_tokens"),
        (caller(), chat(priority=-1), "priority"),
        (caller(priority=5), chat(priority=4), "priority"),
    ],
)
def test_what_is_too_much_is_named(who: Caller, body: Any, param: str):
    with pytest.raises(ReplyError, match=f"^{param}: .* that key 'ann' may ask for") as error:
        check_limits(who, body)
    assert (error.value.status, error.value.param, error.value.code) == (400, param, "key_limit_exceeded")


@pytest.mark.parametrize(
    ("who", "body"),
    [
        (caller(n=2, streams=2, max_tokens=10), chat(n=2, max_tokens=10)),
        (caller(max_tokens=10), chat()),
        (caller(priority=5), chat(priority=5)),
        (caller(), chat(n=128, priority=0)),
        (ANYONE, chat(n=128, priority=-7, max_tokens=10**9)),
    ],
)
def test_what_is_allowed_is(who: Caller, body: Any):
    check_limits(who, body)


def test_without_a_number_of_its_own_an_output_is_cut_at_the_keys():
    assert (most_tokens(caller(max_tokens=10), 500), most_tokens(caller(), 500), most_tokens(ANYONE, 5)) == (10, 500, 5)


def test_models_of_a_key():
    assert allowed_models(ANYONE, ["m", "alias"]) == ("m", "alias")
    assert allowed_models(caller(models=frozenset({"alias", "other"})), ["m", "alias"]) == ("alias",)
    with pytest.raises(ReplyError, match="none of the models") as error:
        allowed_models(caller(models=frozenset({"other"})), ["m", "alias"])
    assert (error.value.status, error.value.param) == (403, "model")
