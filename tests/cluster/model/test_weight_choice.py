"""In how many bits weights are kept."""

from __future__ import annotations

import pytest
from deepseek_checkpoints import make_config

from isotherm.cluster.manifest import ManifestError, parse_manifest
from isotherm.cluster.model.registry import parse
from isotherm.cluster.model.tensors import Part
from isotherm.cluster.model.weight_choice import FORMS, WeightChoice, WeightChoiceError


def test_each_part_has_its_form():
    choice = WeightChoice("int4", "int4", "fp8")
    forms: dict[tuple[Part, bool], set[str]] = {}
    for spec in parse(make_config()).tensors():
        forms.setdefault((spec.part, spec.quantisable), set()).add(choice.form(spec))
    assert {form for (_, quantisable), found in forms.items() if not quantisable for form in found} == {"stored"}
    assert forms[Part.ROUTED_EXPERTS, True] == {"int4"} and forms[Part.HEAD, True] == {"fp8"}
    assert forms[Part.SHARED_EXPERTS, True] == forms[Part.DENSE_MLP, True] == {"int4"}
    assert forms[Part.ATTENTION, True] == {"int4"}
    config = make_config()
    keys = config["qk_nope_head_dim"]
    both = [spec for spec in parse(config).tensors() if spec.both_ways]
    assert both and all(spec.name.endswith("kv_b_proj.weight") for spec in both)
    assert {spec.both_ways for spec in both} == {(keys, keys + config["v_head_dim"])}


def test_words():
    assert WeightChoice().words == "stored" and WeightChoice().is_stored
    assert WeightChoice(experts="int4", head="fp8").words == "experts int4, head fp8"
    assert WeightChoice(experts="int4", head="fp8").kept == "experts int4, head fp8, short scales"
    assert WeightChoice(dense="int4").kept == "dense int4, both ways, short scales"
    assert WeightChoice(head="int4").kept == "head int4, short scales" and WeightChoice().kept == "stored"
    assert WeightChoice(dense="fp8", head="int8").kept == "dense fp8, head int8"
    assert WeightChoice("int4").with_changes(None, "fp8", None) == WeightChoice("int4", "fp8")


@pytest.mark.parametrize(("field", "value"), [("experts", "fp8"), ("dense", "int8"), ("head", "int2"), ("head", "")])
def test_what_is_no_choice_is_refused(field: str, value: str):
    with pytest.raises(WeightChoiceError, match=rf'{field} is "{value}"; it must be stored'):
        WeightChoice(**{field: value})
    with pytest.raises(ManifestError, match=rf"weights\.{field} is '{value}': must be 'stored'"):
        parse_manifest({"weights": {field: value}})


@pytest.mark.parametrize("value", [6, True, ["int4"], {"int4": 1}])
def test_what_is_no_name_is_told_the_names(value: object):
    with pytest.raises(ManifestError, match=r"weights\.head is .*: must be 'stored', 'fp8', 'int8', 'int6' or 'int4'"):
        parse_manifest({"weights": {"head": value}})


@pytest.mark.parametrize(("field", "form"), [(field, form) for field, forms in FORMS.items() for form in forms])
def test_a_manifest_can_say_every_form(field: str, form: str):
    assert getattr(parse_manifest({"weights": {field: form}}).weights.choice, field) == form


def test_a_manifest_has_the_choice():
    manifest = parse_manifest({"weights": {"experts": "int4", "head": "int8"}})
    assert manifest.weights.choice == WeightChoice("int4", "stored", "int8")
    with pytest.raises(ManifestError, match="head is 'fp8': unknown field; known here: .*weights"):
        parse_manifest({"head": "fp8"})
