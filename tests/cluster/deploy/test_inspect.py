"""`isotherm inspect`: the figures of a 671B checkpoint from its config, of small ones from their headers, and no weight
read for either."""

from __future__ import annotations

import builtins
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import quantised_checkpoints as published
import torch
from deepseek_checkpoints import make_checkpoint, make_config, make_tensors, write_checkpoint
from fake_engine import write_tokenizer
from published import DEEPSEEK_V3
from published_families import JOYAI_LLM_FLASH

from isotherm.actors.models.converter import convert
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.deploy.inspect import Report, inspect_model
from isotherm.cluster.manifest import Manifest, ManifestError, parse_manifest
from isotherm.cluster.model.checkpoint import INDEX, Checkpoint, CheckpointError
from isotherm.cluster.model.config import ModelConfigError
from isotherm.cluster.model.conversion import kept_bytes
from isotherm.cluster.model.formats.registry import PLAIN
from isotherm.cluster.model.path import bundled_model, resolve_model
from isotherm.cluster.model.registry import parse
from isotherm.cluster.model.weight_choice import FORMS, WeightChoice
from isotherm.kernels.select import select_kernels

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json and index alone. The index names a tensor of each layer; layer 61 is the MTP layer."""
    path = tmp_path_factory.mktemp("DeepSeek-V3")
    (path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    files = {f"model.layers.{i}.input_layernorm.weight": f"model-{i + 1:05d}-of-000163.safetensors" for i in range(62)}
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 688586727753}, "weight_map": files}))
    return path


@pytest.fixture(scope="module")
def v3_report(v3: Path) -> Report:
    return inspect_model(v3, Manifest())


def without_mtp_layer(path: Path, v3: Path) -> Path:
    index = json.loads((v3 / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if ".61." not in name}
    (path / "config.json").write_text((v3 / "config.json").read_text())
    (path / INDEX).write_text(json.dumps(index))
    return path


def test_deepseek_v3s_parameters(v3_report: Report):
    """Total and active: 671B and 37B by DeepSeek's own count (arXiv:2412.19437)."""
    assert v3_report.parameters["total"] == 671_026_419_200
    assert v3_report.parameters["active"] == 37_552_297_472
    # The MTP layer is a MoE layer, with two norms of its inputs, one before the head, and a projection from 2 × 7168.
    moe_layer = 256 * 3 * 7168 * 2048 + 3 * 7168 * 2048 + 256 * 7168 + 256
    attention = 2 * 7168 + 7168 * 1536 + 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168
    assert v3_report.parameters["multi_token_prediction"] == moe_layer + attention + 3 * 7168 + 2 * 7168**2
    assert (
        sum(v3_report.parameters_by_part.values())
        == v3_report.parameters["total"] + v3_report.parameters["multi_token_prediction"]
    )


def test_the_form_of_tool_calls_is_what_the_template_shows_or_the_manifest_says(v3: Path, tmp_path: Path):
    for name in ("config.json", INDEX):
        (tmp_path / name).write_text((v3 / name).read_text())
    assert inspect_model(tmp_path, Manifest()).architecture["tool_calls"] == "none that is known"
    (tmp_path / "chat_template.jinja").write_text("<tool_call>{{ c.name }}<arg_key>{{ key }}</arg_key>")
    assert inspect_model(tmp_path, Manifest()).architecture["tool_calls"] == "glm4"
    assert inspect_model(tmp_path, parse_manifest({"tool_format": "hermes"})).architecture["tool_calls"] == "hermes"


def test_deepseek_v3s_cache(v3_report: Report, v3: Path):
    assert v3_report.kv_bytes_per_token == 576 * 61 * 2
    assert inspect_model(v3, parse_manifest({"dtype": "float32"})).kv_bytes_per_token == 576 * 61 * 4


def test_deepseek_v3s_experts_by_hand(v3_report: Report):
    experts = 58 * 256
    assert v3_report.parameters_by_part["routed experts"] == experts * 3 * 7168 * 2048
    # FP8, and a float32 scale for each of 16 × 56 blocks.
    assert v3_report.bytes_by_part["routed experts"] == experts * 3 * (7168 * 2048 + 4 * 16 * 56)
    assert "estimate" in v3_report.bytes_from and v3_report.files == 62
    assert 680e9 < sum(v3_report.bytes_by_part.values()) < 690e9  # the published files have 688.6 GB


def test_the_architecture_is_told(v3_report: Report):
    a = v3_report.architecture
    assert (a["layers"], a["dense_layers"], a["moe_layers"]) == (61, 3, 58)
    assert (
        a["routed_experts"] == "8 of 256, 4 of 8 router groups"
        and a["rope"] == "YaRN ×40 from 4096"
        and a["weights"].startswith("FP8")
    )
    assert json.loads(json.dumps(v3_report.as_dict())) == v3_report.as_dict()


def test_the_index_decides_whether_there_is_an_mtp_layer(tmp_path: Path, v3: Path):
    """V3.1 and others keep num_nextn_predict_layers in config.json and leave the layer out, or the other way round."""
    report = inspect_model(without_mtp_layer(tmp_path, v3), Manifest())
    assert report.parameters["multi_token_prediction"] == 0 and report.parameters["total"] == 671_026_419_200
    assert "multi-token prediction" not in report.bytes_by_part


@pytest.mark.parametrize(("scales", "words"), [(True, "FP8 e4m3, 128×128 blocks"), (False, "bfloat16")])
@pytest.mark.parametrize("claimed", [True, False])
def test_the_index_decides_whether_weights_are_fp8(tmp_path: Path, v3: Path, scales: bool, words: str, claimed: bool):
    """Without the files: a config.json from before a conversion, or from after one, that the index contradicts."""
    raw = (
        DEEPSEEK_V3
        if claimed
        else {name: value for name, value in DEEPSEEK_V3.items() if name != "quantization_config"}
    )
    (tmp_path / "config.json").write_text(json.dumps(raw))
    names = [spec.name for spec in parse(raw).tensors()]
    names += [f"{name}_scale_inv" for name in names if scales and name.endswith("_proj.weight")]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    report = inspect_model(tmp_path, Manifest())
    assert report.architecture["weights"] == words and report.architecture["multi_token_prediction"] == "none"
    assert report.bytes_by_part["routed experts"] == 58 * 256 * 3 * (
        7168 * 2048 + 4 * 16 * 56 if scales else 2 * 7168 * 2048
    )


def test_what_goes_where(v3: Path):
    manifest = parse_manifest(
        {"attention": {"shards": 2}, "experts": {"groups": 12}, "engine": {"block_size": 64, "kv_memory": "36GiB"}}
    )
    rows = inspect_model(v3, manifest).placement
    assert [row["worker"] for row in rows] == ["attention-0", "attention-1", *(f"expert-{i}" for i in range(12))]
    assert rows[0]["kv_tokens"] == (36 << 30) // (64 * 576 * 61 * 2) * 64 and rows[0]["kv_bytes"] == 36 << 30
    assert sum(row.get("experts", 0) for row in rows) == 58 * 256
    held = [row["experts"] for row in rows[2:]]
    assert max(held) - min(held) <= 58  # 256 experts in 12 parts: 21 or 22 of each layer
    each = 3 * (7168 * 2048 + 4 * 16 * 56)
    assert all(row["weight_bytes"] == row["experts"] * each for row in rows[2:])
    assert 17e9 < rows[0]["weight_bytes"] < 20e9


def test_the_weights_that_a_manifest_chooses_are_those_that_are_counted(v3: Path):
    stored = inspect_model(v3, Manifest())
    chosen = inspect_model(v3, parse_manifest({"weights": {"experts": "int4", "head": "fp8"}}))
    projection = 7168 * 2048
    int4 = 3 * (projection // 2 + projection // 32 + 16)  # codes, a byte for each group of 32, and its shape
    group = chosen.placement[1]
    assert group["weight_bytes"] == group["experts"] * int4
    head, scales = 129280 * 7168, 4 * 1010 * 56
    assert chosen.placement[0]["weight_bytes"] == stored.placement[0]["weight_bytes"] - 2 * head + head + scales
    assert (stored.kept, chosen.kept) == ("stored", "experts int4, head fp8")
    assert chosen.bytes_by_part == stored.bytes_by_part, "what the files have"
    dense = inspect_model(v3, Manifest(), WeightChoice(dense="fp8"))
    assert dense.placement == stored.placement, "it has them in FP8"


def test_the_layer_that_drafts_is_counted_where_it_does(v3: Path, tmp_path: Path):
    plain, drafting = (inspect_model(v3, parse_manifest({"speculation": {"kind": kind}})) for kind in ("ngram", "mtp"))
    assert plain.placement == inspect_model(v3, Manifest()).placement
    assert drafting.kv_bytes_per_token == 576 * 62 * 2 == plain.kv_bytes_per_token + 576 * 2
    groups, before = drafting.placement[1:], plain.placement[1:]
    assert sum(row["experts"] for row in groups) == 59 * 256
    assert groups[0]["weight_bytes"] * 58 == before[0]["weight_bytes"] * 59
    more = drafting.placement[0]["weight_bytes"] - plain.placement[0]["weight_bytes"]
    assert more == drafting.bytes_by_part["multi-token prediction"] - 256 * 3 * (7168 * 2048 + 4 * 16 * 56)
    assert drafting.placement[0]["kv_tokens"] < plain.placement[0]["kv_tokens"]
    assert drafting.architecture["multi_token_prediction"] == "there, and drafts"
    assert (drafting.architecture["moe_layers"], drafting.parameters) == (58, plain.parameters)
    without = inspect_model(without_mtp_layer(tmp_path, v3), parse_manifest({"speculation": {"kind": "auto"}}))
    assert without.placement == plain.placement


def test_joyais_layer_that_drafts_has_no_experts(tmp_path: Path):
    """It is counted among the shard's weights, and the groups hold what they hold without it."""
    (tmp_path / "config.json").write_text(json.dumps(JOYAI_LLM_FLASH))
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(41)]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1-of-1.safetensors")}))
    plain, drafting = (
        inspect_model(tmp_path, parse_manifest({"speculation": {"kind": kind}})) for kind in ("ngram", "mtp")
    )
    attention = 2 * 2048 + 2048 * 1536 + 1536 + 1536 * 32 * 192 + 2048 * 576 + 512 + 512 * 32 * 256 + 32 * 128 * 2048
    layer = attention + 3 * 2048 * 7168 + 3 * 2048 + 2 * 2048**2
    assert drafting.parameters == plain.parameters and drafting.parameters["multi_token_prediction"] == layer
    assert drafting.bytes_by_part["multi-token prediction"] == 2 * layer
    assert sum(row.get("experts", 0) for row in drafting.placement) == 39 * 256
    assert drafting.placement[1:] == plain.placement[1:]
    assert drafting.placement[0]["weight_bytes"] == plain.placement[0]["weight_bytes"] + 2 * layer


def test_a_cache_that_is_too_small_is_refused(v3: Path):
    with pytest.raises(ManifestError, match=r"engine\.kv_memory is 1000 bytes"):
        inspect_model(v3, parse_manifest({"engine": {"kv_memory": 1000}}))


# --- real files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_bytes_and_parameters_are_those_of_the_files(tmp_path: Path, fp8: bool, shards: int):
    make_checkpoint(tmp_path, {"hidden_size": 130}, fp8=fp8, shards=shards, mtp=True)
    report = inspect_model(tmp_path, Manifest())
    tensors = make_tensors(make_config({"hidden_size": 130}, fp8=fp8, mtp=True), fp8=fp8)
    assert report.bytes_from == "safetensors headers" and report.files == shards
    assert sum(report.bytes_by_part.values()) == sum(t.nbytes for t in tensors.values())
    main = {
        name: t
        for name, t in tensors.items()
        if not name.startswith("model.layers.3.") and not name.endswith("_scale_inv")
    }
    assert report.parameters["total"] == sum(t.numel() for t in main.values())
    experts = [t.numel() for name, t in main.items() if ".experts." in name]
    assert report.parameters["active"] == report.parameters["total"] - sum(experts) * 9 // 12  # 3 of 12 experts


def test_what_drafts_and_what_is_chosen_are_counted_in_files_too(tmp_path: Path):
    make_checkpoint(tmp_path, dtype="bfloat16", mtp=True)
    tensors = make_tensors(make_config(mtp=True), dtype="bfloat16")
    again = ("layers.3.embed_tokens.weight", "layers.3.shared_head.head.weight")
    loaded = {name: t for name, t in tensors.items() if not name.endswith(again)}
    experts = {name: t for name, t in loaded.items() if ".experts." in name}
    manifest = {"speculation": {"kind": "auto"}, "experts": {"groups": 1}}
    shard, group = inspect_model(tmp_path, parse_manifest(manifest)).placement
    assert group["weight_bytes"] == sum(t.nbytes for t in experts.values())
    own = [t.nbytes for name, t in loaded.items() if name not in experts or name.startswith("model.layers.3.")]
    assert shard["weight_bytes"] == sum(own), (
        "the experts of the layer that drafts are so few that shards have them too"
    )
    _, int4 = inspect_model(tmp_path, parse_manifest({**manifest, "weights": {"experts": "int4"}})).placement
    assert int4["experts"] == group["experts"] and 0.25 < int4["weight_bytes"] / group["weight_bytes"] < 0.4


@pytest.mark.parametrize(
    ("stored", "words"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32")]
)
def test_a_quantization_config_that_was_left_over_does_not_count(tmp_path: Path, stored: str, words: str):
    make_checkpoint(tmp_path, make_config(fp8=True, dtype="bfloat16"), dtype=stored)
    report, plain = inspect_model(tmp_path, Manifest()), make_tensors(make_config(), dtype=stored)
    assert report.architecture["weights"] == words
    assert sum(report.bytes_by_part.values()) == sum(t.nbytes for t in plain.values())


def test_fp8_weights_need_no_quantization_config(tmp_path: Path):
    make_checkpoint(tmp_path, {"quantization_config": None}, fp8=True)
    assert inspect_model(tmp_path, Manifest()).architecture["weights"] == "FP8 e4m3, 128×128 blocks"


@pytest.mark.parametrize("in_files", [True, False])
@pytest.mark.parametrize("in_config", [1, 0])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_files_decide_whether_there_is_an_mtp_layer(tmp_path: Path, in_files: bool, in_config: int, shards: int):
    config = make_config({"num_nextn_predict_layers": int(in_files)})
    tensors = make_tensors(config)
    write_checkpoint(tmp_path, config | {"num_nextn_predict_layers": in_config}, tensors, shards)
    report = inspect_model(tmp_path, Manifest())
    again = (".embed_tokens.weight", ".shared_head.head.weight")
    mtp = sum(
        t.numel() for name, t in tensors.items() if name.startswith("model.layers.3.") and not name.endswith(again)
    )
    assert report.parameters["multi_token_prediction"] == mtp and (mtp > 0) == in_files
    assert report.architecture["multi_token_prediction"] == ("there, for `speculation`" if in_files else "none")


def test_headers_alone_are_enough_and_weights_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The files are cut off behind their headers and stretched to their length by a hole; and nothing is read past the
    header."""
    make_checkpoint(tmp_path, shards=2)
    headers = {}
    for file in tmp_path.glob("*.safetensors"):
        size, head = file.stat().st_size, 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
        os.truncate(file, head)
        os.truncate(file, size)
        headers[file] = head
    read: dict[Path, int] = {}
    original = builtins.open

    def counting(path: Any, *args: Any, **kwargs: Any) -> Any:
        stream = original(path, *args, **kwargs)
        if Path(str(path)) in headers:
            inner = stream.read
            stream = _Counted(stream, lambda n: read.update({Path(path): read.get(Path(path), 0) + n}), inner)
        return stream

    monkeypatch.setattr(builtins, "open", counting)
    assert inspect_model(tmp_path, Manifest()).bytes_from == "safetensors headers"
    assert read == headers


class _Counted:
    def __init__(self, stream: Any, count: Any, read: Any):
        self._stream, self._count, self._read = stream, count, read

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def read(self, n: int = -1) -> bytes:
        data = self._read(n)
        self._count(len(data))
        return data


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a hub's repository gives of one that is asked for without weights."""
    fetched = tmp_path / "fetched"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(fetched))
    return fetched


def test_a_hubs_model_of_which_some_files_were_fetched_is_estimated(hub: Path):
    """The rest of an earlier download that was broken off."""
    make_checkpoint(hub, dtype="bfloat16", shards=2, mtp=True)
    write_tokenizer(hub)
    whole = inspect_model(resolve_model("org/model", weights=False), Manifest())
    next(iter(hub.glob("*-00002-*"))).unlink()
    report = inspect_model(resolve_model("org/model", weights=False), Manifest())
    assert report.bytes_from == "estimate from config.json and the index: 1 of 2 weight files are not here"
    assert (report.parameters, report.files) == (whole.parameters, 2)
    assert report.bytes_by_part["routed experts"] == whole.bytes_by_part["routed experts"]


@pytest.mark.parametrize("fp8", [False, True])
def test_a_hubs_model_in_one_file_is_estimated_by_its_config(hub: Path, fp8: bool):
    """It has no index, which would be fetched."""
    make_checkpoint(hub, make_config(fp8=fp8, dtype="bfloat16"), fp8=fp8, dtype="bfloat16")
    write_tokenizer(hub)
    whole = inspect_model(resolve_model("org/model", weights=False), Manifest())
    (hub / "model.safetensors").unlink()
    report = inspect_model(resolve_model("org/model", weights=False), Manifest())
    assert report.bytes_from == "estimate from config.json: neither weight files nor an index are here"
    assert (report.parameters, report.files) == (whole.parameters, 0)
    assert report.bytes_by_part["routed experts"] == whole.bytes_by_part["routed experts"]
    assert report.architecture["weights"] == whole.architecture["weights"]
    assert report.architecture["multi_token_prediction"] == "not known"


def test_pickles_alone_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: is a pickle"):
        inspect_model(tmp_path, Manifest())


@pytest.mark.parametrize(
    "choice", [WeightChoice("stored", "fp8", "int8"), WeightChoice(head="int8"), WeightChoice("int4", "fp8", "fp8")]
)
def test_eight_bits_of_compressed_tensors_are_counted_without_the_files(tmp_path: Path, choice: WeightChoice):
    convert(bundled_model(), tmp_path, choice)
    there = inspect_model(tmp_path, Manifest())
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    estimate = inspect_model(tmp_path, Manifest())
    assert "estimate" in estimate.bytes_from
    for part, nbytes in there.bytes_by_part.items():
        assert estimate.bytes_by_part[part] == pytest.approx(nbytes, rel=0.07), part


@pytest.mark.parametrize("head", FORMS["head"][1:])
def test_a_quantised_head_is_counted_as_kernels_keep_it(head: str):
    config = parse(json.loads((bundled_model() / "config.json").read_text()))
    spec = next(spec for spec in config.tensors() if spec.name == "lm_head.weight")
    with WeightReader(Checkpoint.open(bundled_model()), WeightChoice(head=head)) as reader:
        kept = select_kernels("auto", torch.bfloat16, 1).kernels.pack_linear([reader.head(spec.name)])
    counted = kept_bytes(spec, WeightChoice(head=head), PLAIN, 2 * math.prod(spec.shape))
    assert counted == pytest.approx(kept.nbytes, rel=0.001)


@pytest.mark.parametrize("kind", ["pack-quantized", "gptq", "mxfp4"])
def test_what_is_packed_is_no_fewer_parameters(tmp_path: Path, kind: str):
    narrow, numbers = published.written(tmp_path, kind, mtp=True)
    counted = inspect_model(narrow, Manifest()).parameters
    assert counted == inspect_model(numbers, Manifest()).parameters and counted["multi_token_prediction"] > 0


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, ModelConfigError, "not found"),
        ("{", ModelConfigError, "not valid JSON"),
        ('{"model_type": "llama"}', ModelConfigError, "model_type"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: str | None, error: type[Exception], words: str):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error) as caught:
        inspect_model(tmp_path, Manifest())
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x"}}', "\x00"]
)
def test_a_broken_index_is_refused(tmp_path: Path, index: str):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        inspect_model(tmp_path, Manifest())


def test_it_says_what_the_text_is_made_with(tmp_path: Path):
    make_checkpoint(tmp_path)
    said = inspect_model(tmp_path, Manifest()).architecture
    assert said["family"] == "DeepSeek-V3 (deepseek_v3)" and said["tokenizer"] == said["chat_template"] == "none"
    assert said["not_supported"] == (
        "text: there is neither tokenizer.json nor tiktoken.model, so that token ids alone are taken; "
        "chats: there is no chat template"
    )
    write_tokenizer(tmp_path)
    said = inspect_model(tmp_path, Manifest()).architecture
    assert (said["tokenizer"], said["chat_template"]) == ("tokenizer.json", "tokenizer_config.json")
    assert said["not_supported"] == "nothing that is known of"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    said = inspect_model(tmp_path, Manifest()).architecture
    assert said["not_supported"].startswith("chats: the model's chat template does not compile: ")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tiktoken.model").write_text("")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    said = inspect_model(tmp_path, Manifest()).architecture
    assert said["tokenizer"] == "tiktoken.model, converted when it is loaded"
    assert said["chat_template"] == "chat_template.jinja"
    assert said["not_supported"].startswith("text: tiktoken.model is of tokenizer_class 'LlamaTokenizerFast'; known is")
