from __future__ import annotations

import dataclasses
import inspect

import pytest

from isotherm.cluster.messages.requests import (
    Delta,
    FinishReason,
    GenerationRequest,
    SamplingParams,
)


def test_a_resumed_request_differs_in_what_was_generated_and_was_accepted():
    request = GenerationRequest("a", (1, 2), SamplingParams(9, temperature=0.5, seed=3))
    resumed = request.resumed((7, 8))
    assert resumed == GenerationRequest("a", (1, 2), SamplingParams(9, temperature=0.5, seed=3), (7, 8), accepted=True)
    assert (request.generated, request.accepted) == ((), False)
    assert request.resumed((), 3) == dataclasses.replace(request, scored=3, accepted=True)
    assert resumed.resumed(()) == dataclasses.replace(request, accepted=True)


@pytest.mark.parametrize("value", [SamplingParams(1), GenerationRequest("a", (1,), SamplingParams(1)), Delta("a", 0)])
def test_messages_are_frozen(value: object):
    field = dataclasses.fields(value)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, 2)


def test_parameters_cut_nothing_unless_asked():
    params = SamplingParams(5)
    assert (params.temperature, params.top_p, params.top_k, params.stop_token_ids, params.logprobs) == (
        1.0,
        1.0,
        0,
        (),
        None,
    )


def test_finish_reasons_are_what_openai_calls_them():
    assert (FinishReason.STOP.value, FinishReason.LENGTH.value) == ("stop", "length")


def test_a_deltas_values_come_in_the_order_of_its_fields():
    """Its constructor is written out; nothing else says that the two go together."""
    _, *parameters = inspect.signature(Delta.__init__).parameters.values()
    assert [(p.name, p.default) for p in parameters[2:]] == [(f.name, f.default) for f in dataclasses.fields(Delta)[2:]]
    names = [field.name for field in dataclasses.fields(Delta)]
    assert vars(Delta(*names)) == dict(zip(names, names, strict=True))  # type: ignore[arg-type]
