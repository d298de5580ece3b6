"""`isotherm convert`: what it writes is what loading with the choice gives, and it goes on where it was stopped."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import quantised_checkpoints as published
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from deepseek_checkpoints import make_config
from family_checkpoints import make_family
from safetensors.torch import load_file

from isotherm.actors.models import converter
from isotherm.actors.models.converter import convert, with_quantisation
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.cli.offline import OfflineOptions, generate_offline
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.conversion import ConversionError, patterns
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.model.tensors import mlp_projections
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.kernels.formats.grouped import Int4Weight

pytestmark = pytest.mark.slow

OPTIONS = OfflineOptions(
    prompt=None, prompt_ids="5,250,17,99,4,123", chat=None, max_tokens=16, temperature=0.0, top_p=1.0, top_k=0, seed=0,
    ignore_eos=True, dtype="bfloat16", kernels="auto", logprobs=3,
)  # fmt: skip
FP8_CONFIG = make_config(fp8=True)["quantization_config"]
SMALL = 2 << 20  # bytes a file, so that the bundled model makes several


def generate(path: Path, choice: WeightChoice | None = None) -> dict[str, Any]:
    return generate_offline(Manifest(), path, OfflineOptions(**(vars(OPTIONS) | {"weights": choice})))


@pytest.mark.parametrize(
    "choice",
    [
        WeightChoice("int4"),
        WeightChoice("int4", "int4", "int8"),
        WeightChoice("int4", "int4", "int4"),
        WeightChoice("stored", "fp8", "fp8"),
    ],
)
def test_its_tokens_are_those_of_loading_with_the_choice(tmp_path: Path, choice: WeightChoice):
    plan = convert(bundled_model(), tmp_path, choice, SMALL)
    assert len(plan.shards) > 2 and all((tmp_path / shard.file).is_file() for shard in plan.shards)
    converted, loaded = generate(tmp_path), generate(bundled_model(), choice)
    assert (converted["token_ids"], converted["logprobs"]) == (loaded["token_ids"], loaded["logprobs"])
    assert loaded["logprobs"] != generate(bundled_model())["logprobs"]
    assert loaded["system_fingerprint"] != generate(bundled_model())["system_fingerprint"]
    assert (tmp_path / "tokenizer.json").read_bytes() == (bundled_model() / "tokenizer.json").read_bytes()


def test_a_conversion_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    choice, whole = WeightChoice("int4"), tmp_path / "whole"
    plan = convert(bundled_model(), whole, choice, SMALL)
    out, written = tmp_path / "out", []
    original = converter._write_shard

    def stopped(file: Path, *rest: Any) -> None:
        if len(written) == 2:
            file.with_name(file.name + converter.PARTIAL).write_bytes(b"half of it")
            raise KeyboardInterrupt
        written.append(file.name)
        original(file, *rest)

    monkeypatch.setattr(converter, "_write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(bundled_model(), out, choice, SMALL)
    assert not (out / "config.json").exists() and written == [shard.file for shard in plan.shards[:2]]
    os.truncate(out / plan.shards[0].file, plan.shards[0].nbytes - 1)  # and one that the disk has lost a part of
    again: list[str] = []
    monkeypatch.setattr(converter, "_write_shard", lambda file, *rest: again.append(file.name) or original(file, *rest))
    convert(bundled_model(), out, choice, SMALL)
    assert again == [shard.file for shard in plan.shards if shard.file != plan.shards[1].file]
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}


def test_files_of_another_choice_are_not_taken_for_its_own(tmp_path: Path):
    convert(bundled_model(), tmp_path, WeightChoice("int4"), 1 << 30)
    before = (tmp_path / "model-00001-of-00001.safetensors").read_bytes()
    convert(bundled_model(), tmp_path, WeightChoice("int4", head="int8"), 1 << 30)
    assert before != (tmp_path / "model-00001-of-00001.safetensors").read_bytes()
    with pytest.raises(ConversionError, match="holds model-00001-of-00001.safetensors, which is not of this"):
        convert(bundled_model(), tmp_path, WeightChoice("int4"), SMALL)


def test_compressed_tensors_reads_it(tmp_path: Path):
    """The library's own classes take the config, and unpack the numbers that loading with the choice gives."""
    convert(bundled_model(), tmp_path, WeightChoice("int4", "int4", "int8"))
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(said).config_groups["group_0"]
    tensors = load_file(tmp_path / "model-00001-of-00001.safetensors")
    name = "model.layers.2.mlp.experts.3.down_proj"
    parts = {leaf: tensors[f"{name}.{leaf}"] for leaf in ("weight_packed", "weight_scale", "weight_shape")}
    parts["weight_scale"] = parts["weight_scale"].float()
    with WeightReader(Checkpoint.open(bundled_model()), WeightChoice("int4")) as reader:
        expected = reader.stored(f"{name}.weight").dequantise(torch.float32)
    assert torch.equal(PackedQuantizationCompressor.decompress(parts, scheme)["weight"], expected)


@pytest.mark.parametrize("kind", ["pack-quantized-asymmetric", "pack-quantized-loose-zeros", "gptq-asymmetric", "gptq"])
def test_what_has_four_bits_keeps_its_numbers(tmp_path: Path, kind: str):
    narrow, _ = published.written(tmp_path, kind)
    convert(narrow, tmp_path / "out", WeightChoice("int4", head="int8"))
    assert generate(tmp_path / "out")["logprobs"] == generate(narrow, WeightChoice(head="int8"))["logprobs"]
    zeros = [i for n, i in Checkpoint.open(tmp_path / "out").tensors.items() if n.endswith("weight_zero_point")]
    assert zeros and {info.dtype for info in zeros} == {"I32"}, "as compressed-tensors reads them today"


def test_a_dense_layer_that_drafts_is_converted_and_quantised_on_load(tmp_path: Path):
    """JoyAI-LLM-Flash's, of which the weights are among the dense ones."""
    shape = published.SHAPE | {"n_group": 1, "topk_group": 1}
    path = make_family(tmp_path / "joyai", "joyai_llm_flash", shape, mtp=True)
    choice = WeightChoice("int4", "int4", "int8")
    convert(path, tmp_path / "out", choice)
    written = Checkpoint.open(tmp_path / "out").with_mtp()
    with WeightReader(written) as converted, WeightReader(Checkpoint.open(path).with_mtp(), choice) as loaded:
        for name in mlp_projections("model.layers.3.mlp"):
            ours, theirs = converted.stored(name), loaded.stored(name)
            assert isinstance(ours, Int4Weight) and isinstance(theirs, Int4Weight)
            assert torch.equal(ours.dequantise(torch.float32), theirs.dequantise(torch.float32))
    drafting = vars(OPTIONS) | {"weights": choice, "speculation": "mtp"}
    expected = generate(path, choice)["logprobs"]
    assert generate_offline(Manifest(), path, OfflineOptions(**drafting))["logprobs"] == expected


def test_what_cannot_be_converted_is_refused(tmp_path: Path):
    with pytest.raises(ConversionError, match="nothing is to be converted; give --experts int4"):
        convert(bundled_model(), tmp_path / "out", WeightChoice())
    with pytest.raises(ConversionError, match=r"--head is int6, .*serve with weights\.head: int6"):
        convert(bundled_model(), tmp_path / "out", WeightChoice("int4", head="int6"))
    with pytest.raises(ConversionError, match="is the checkpoint itself"):
        convert(bundled_model(), bundled_model(), WeightChoice("int4"))
    narrow, _ = published.written(tmp_path, "pack-quantized-asymmetric", all_of=False)
    with pytest.raises(ConversionError, match="in groups of 32 and of 64 inputs"):
        convert(narrow, tmp_path / "out", WeightChoice("int4", "int4"))
    mixed, _ = published.written(tmp_path, "mxfp4")
    with pytest.raises(ConversionError, match="is MXFP4, which cannot stand beside"):
        convert(mixed, tmp_path / "out", WeightChoice("int4"))


def test_patterns_stand_for_any_number():
    names = ["model.layers.0.mlp.experts.11.up_proj.weight", "model.layers.7.mlp.experts.2.up_proj.weight"]
    assert patterns(names) == [r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.up_proj$"]


def test_the_config_changes_where_it_stands():
    assert with_quantisation({"a": 1}, {"b": 2}) == {"a": 1, "quantization_config": {"b": 2}}
    nested = {"text_config": {"a": 1, "quantization_config": {}}}
    assert with_quantisation(nested, {"b": 2}) == {"text_config": {"a": 1, "quantization_config": {"b": 2}}}
    assert with_quantisation(nested | {"quantization_config": None}, {"b": 2}) == with_quantisation(nested, {"b": 2})
    assert with_quantisation(nested | {"quantization_config": {"c": 3}}, {"b": 2}) == {
        "text_config": {"a": 1}, "quantization_config": {"b": 2}
    }  # fmt: skip


@pytest.mark.parametrize("outer", [FP8_CONFIG, None])
def test_a_quantisation_that_was_left_over_does_not_count(tmp_path: Path, outer: dict[str, Any] | None):
    """In Kimi K2.5's config.json it may stand in two places."""
    path = make_family(tmp_path / "k25", "kimi_k25", {"n_group": 1, "topk_group": 1}, fp8=True)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["quantization_config"] = FP8_CONFIG
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": outer}))
    convert(path, tmp_path / "out", WeightChoice("int4"))
    assert Checkpoint.open(tmp_path / "out").weight_format() == "4-bit integers, groups of 32"


def test_named_templates_are_taken_along(tmp_path: Path):
    source, beside = tmp_path / "source", "additional_chat_templates"
    shutil.copytree(bundled_model(), source)
    (source / beside).mkdir()
    (source / beside / "rag.jinja").write_text("{{ documents }}")
    for _ in range(2):  # and where they are there already
        convert(source, tmp_path / "out", WeightChoice("int4"))
    assert (tmp_path / "out" / beside / "rag.jinja").read_text() == "{{ documents }}"
