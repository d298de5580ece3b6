from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_checkpoint, make_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from isotherm.cluster.model import checkpoint as checkpoint_module
from isotherm.cluster.model.checkpoint import (
    INDEX,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    read_headers,
    shard_files,
)
from isotherm.cluster.model.config import ModelConfigError
from isotherm.cluster.model.formats.fp8 import E4M3
from isotherm.cluster.model.registry import parse
from isotherm.cluster.model.tensors import Part, TensorSpec

Tensors = dict[str, Tensor]


def failure(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    return str(caught.value)


def write_raw(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header: an object, or bytes to be taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


# --- complete checkpoints -------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("fp8", [False, True])
def test_every_tensor_is_found_with_its_file_dtype_shape_and_size(tmp_path: Path, shards: int, fp8: bool):
    make_checkpoint(tmp_path, {"hidden_size": 130}, fp8=fp8, shards=shards, mtp=True)
    checkpoint = Checkpoint.open(tmp_path)
    stored: dict[str, tuple[Path, Tensor]] = {}
    for file in tmp_path.glob("*.safetensors"):
        stored |= {name: (file, tensor) for name, tensor in load_file(file).items()}
    assert set(checkpoint.tensors) == set(stored)
    assert len({info.file for info in checkpoint.tensors.values()}) == shards
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: E4M3}
    for name, (file, tensor) in stored.items():
        info = checkpoint.tensors[name]
        assert (info.file, info.dtype, info.shape, info.nbytes) == (
            file,
            names[tensor.dtype],
            tuple(tensor.shape),
            tensor.nbytes,
        )
    assert fp8 == any(info.dtype == E4M3 for info in checkpoint.tensors.values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_may_be_stored_in_any_float(tmp_path: Path, dtype: str):
    assert Checkpoint.open(make_checkpoint(tmp_path, dtype=dtype)).config.stored_dtype == dtype


def test_bytes_by_part_count_scales_and_the_mtp_layer(tmp_path: Path):
    make_checkpoint(tmp_path, {"hidden_size": 130}, fp8=True, mtp=True)
    checkpoint = Checkpoint.open(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    by_part = checkpoint.nbytes_by_part()
    assert sum(by_part.values()) == sum(t.nbytes for t in tensors.values())
    assert by_part[Part.ROUTED_EXPERTS] == sum(
        t.nbytes for n, t in tensors.items() if ".experts." in n and not n.startswith("model.layers.3.")
    )
    assert by_part[Part.MTP] == sum(t.nbytes for n, t in tensors.items() if n.startswith("model.layers.3."))
    assert set(checkpoint.mtp_tensors()) == {n for n in tensors if n.startswith("model.layers.3.")}


def test_parts_that_a_model_does_not_have_are_not_listed(tmp_path: Path):
    make_checkpoint(tmp_path, {"first_k_dense_replace": 3})
    assert set(Checkpoint.open(tmp_path).nbytes_by_part()) == {
        Part.EMBEDDING,
        Part.ATTENTION,
        Part.DENSE_MLP,
        Part.HEAD,
    }


def test_tensors_that_nothing_needs_are_no_error(tmp_path: Path):
    make_checkpoint(
        tmp_path,
        change=lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4, dtype=torch.int64)}),
    )
    Checkpoint.open(tmp_path)


# --- tensors that are not as they should be -------------------------------------------------------

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"


def set_to(name: str, value: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def test_any_missing_tensor_is_named_with_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    raw = make_config({"attention_bias": True})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensors = {s.name: TensorInfo(tmp_path / "a", "F32", s.shape, 0) for s in parse(raw).tensors()}
    monkeypatch.setattr(checkpoint_module, "read_headers", lambda _: (tensors, {}))
    Checkpoint.open(tmp_path)
    for name in list(tensors):
        taken = tensors.pop(name)
        assert failure(tmp_path) == f"{tmp_path}: tensor {name} is missing; expected shape {list(taken.shape)}"
        tensors[name] = taken


@pytest.mark.parametrize("name", [GATE, NORM, "lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_a_missing_tensor_stops_the_opening(tmp_path: Path, name: str):
    make_checkpoint(tmp_path, change=drop(name))
    assert f"{tmp_path}: tensor {name} is missing; expected shape [" in failure(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (GATE, torch.zeros(56, 36), "expected shape [36, 56], found [56, 36]"),
        (GATE, torch.zeros(36 * 56), "expected shape [36, 56], found [2016]"),
        (NORM, torch.zeros(57), "expected shape [56], found [57]"),
        (NORM, torch.zeros(()), "expected shape [56], found []"),
        (GATE, torch.zeros(36, 56, dtype=torch.int16), "expected dtype F32, F16, BF16, F8_E4M3, I8, found I16"),
        (
            GATE,
            torch.zeros(36, 56, dtype=torch.int8),
            f"is I8, but {GATE}_scale is missing; expected shape [36, 2]",
        ),
        (
            GATE,
            torch.zeros(36, 56, dtype=torch.float8_e5m2),
            "expected dtype F32, F16, BF16, F8_E4M3, I8, found F8_E5M2",
        ),
        (NORM, torch.zeros(56, dtype=torch.float64), "expected dtype F32, F16, BF16, found F64"),
        (NORM, torch.zeros(56, dtype=torch.float8_e4m3fn), "expected dtype F32, F16, BF16, found F8_E4M3"),
        (
            GATE,
            torch.zeros(36, 56, dtype=torch.float8_e4m3fn),
            f"is F8_E4M3, but {GATE}_scale_inv is missing; expected shape [1, 1]",
        ),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file_and_what_was_expected(
    tmp_path: Path, name: str, value: Tensor, message: str
):
    make_checkpoint(tmp_path, shards=2, change=set_to(name, value))
    file = json.loads((tmp_path / INDEX).read_text())["weight_map"][name]
    assert failure(tmp_path) == f"{tmp_path / file}: tensor {name}: {message}"


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.ones(2, 2), "shape [1, 2], found [2, 2]"),
        (torch.ones(3, 1), "shape [1, 2], found [3, 1]"),
        (torch.ones(1), "shape [1, 2], found [1]"),
        (torch.ones(1, 2, dtype=torch.int32), "dtype F32, F16, BF16, F8_E8M0, found I32"),
    ],
)
def test_a_scale_that_does_not_fit_its_ragged_blocks(tmp_path: Path, scale: Tensor, words: str):
    make_checkpoint(tmp_path, {"hidden_size": 129}, fp8=True, change=set_to(f"{GATE}_scale_inv", scale))
    assert failure(tmp_path) == f"{tmp_path / 'model.safetensors'}: tensor {GATE}_scale_inv: expected {words}"


def test_a_scale_beside_a_weight_that_is_not_fp8(tmp_path: Path):
    make_checkpoint(tmp_path, change=set_to(f"{GATE}_scale_inv", torch.ones(1, 1)))
    assert failure(tmp_path).endswith(
        f"tensor {GATE}: is BF16, but {GATE}_scale_inv stands in model.safetensors; a plain weight has none"
    )


# --- files that are not as they should be ---------------------------------------------------------


def open_file(tmp_path: Path, header: Any, data: bytes = b"", length: int | None = None) -> str:
    """What reading one hand-made file says."""
    file = write_raw(tmp_path / "a.safetensors", header, data, length)
    with pytest.raises(CheckpointError) as caught:
        read_headers(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    return str(caught.value).removeprefix(f"{file}: ")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1, -5000])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int):
    file = make_checkpoint(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    assert failure(tmp_path).startswith(f"{file}: ")


def test_a_tensor_cut_off_by_the_end_of_the_file_is_named(tmp_path: Path):
    file = make_checkpoint(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    last = max(read_headers(tmp_path)[0].items(), key=lambda item: data.index(f'"{item[0]}"'.encode()))[0]
    file.write_bytes(data[:-1])
    assert (
        failure(tmp_path)
        == f"{file}: tensor {last}: is truncated: expected {len(data)} bytes of file, found {len(data) - 1}"
    )


def test_bytes_behind_the_last_tensor(tmp_path: Path):
    file = make_checkpoint(tmp_path) / "model.safetensors"
    size = file.stat().st_size
    with open(file, "ab") as stream:
        stream.write(b"\0")
    assert (
        failure(tmp_path)
        == f"{file}: expected {size} bytes of file, found {size + 1}: there is something behind the last tensor"
    )


@pytest.mark.parametrize("length", [0, 1, 3, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_cannot_be(tmp_path: Path, length: int):
    assert open_file(tmp_path, b"{}", length=length) == f"not a safetensors file: header length {length}, file size 10"


def test_a_giant_header_is_refused_unread(tmp_path: Path):
    """A sparse file of 1 GiB: reading it as JSON would take seconds and gigabytes."""
    file = write_raw(tmp_path / "a.safetensors", b"{}", length=2**30)
    os.truncate(file, 2**30 + 8)
    with pytest.raises(CheckpointError, match=f"not a safetensors file: header length {2**30}"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff\xfe\xfd\xfc", "its safetensors header cannot be read"),
        (b"{'a': 1}", "its safetensors header cannot be read"),
        (b'{"a": ' * 50_000, "its safetensors header cannot be read"),
        (b"[]", "its safetensors header is not an object"),
        (b"42", "its safetensors header is not an object"),
        ({"a": 3}, "tensor a: malformed header entry"),
        ({"a": {}}, "tensor a: malformed header entry"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "tensor a: malformed header entry"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "tensor a: malformed header entry"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": None}}, "tensor a: malformed header entry"),
        ({"a": entry(0, 4, shape="1")}, "tensor a: malformed header entry"),
        ({"a": entry(0, 4, shape=["1"])}, "tensor a: malformed header entry"),
        ({"a": entry(0, 4, shape=[1.0])}, "tensor a: malformed header entry"),
        ({"a": entry(0, 4, shape=[True])}, "tensor a: malformed header entry"),
        (b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}', "tensor a: malformed header entry"),
        ({"a": entry(0, 4, dtype=["F32"])}, "tensor a: dtype ['F32'] is not known"),
        ({"a": entry(0, 4, dtype="F33")}, "tensor a: dtype F33 is not known"),
        ({"a": entry(0, 4, shape=[2])}, "tensor a: F32 [2] expected 8 bytes, found offsets [0, 4]"),
        ({"a": entry(0, 4, shape=[-1, -1])}, "tensor a: F32 [-1, -1] expected 4 bytes, found offsets [0, 4]"),
        ({"a": entry(4, 0, shape=[-1])}, "tensor a: F32 [-1] expected -4 bytes, found offsets [4, 0]"),
        ({"a": entry(-4, 0)}, "tensor a: F32 [1] expected 4 bytes, found offsets [-4, 0]"),
        ({"a": entry(0, 12)}, "tensor a: is truncated: expected "),
        ({"a": entry(0, 8), "b": entry(4, 8)}, "tensors a and b overlap"),
        ({"b": entry(0, 4), "a": entry(0, 8)}, "tensors b and a overlap"),
        ({"a": entry(4, 8)}, "tensor a: expected to begin at data offset 0, found 4"),
        (
            {"a": entry(0, 4), "b": entry(6, 8, dtype="F16", shape=[1])},
            "tensor b: expected to begin at data offset 4, found 6",
        ),
    ],
)
def test_a_malformed_header(tmp_path: Path, header: Any, message: str):
    assert open_file(tmp_path, header, bytes(8)).startswith(message)


def test_metadata_and_empty_tensors_are_no_error(tmp_path: Path):
    header = {"__metadata__": {"format": "pt"}, "b": entry(4, 8), "e": entry(4, 4, shape=[0, 7]), "a": entry(0, 4)}
    write_raw(tmp_path / "a.safetensors", header, bytes(8))
    assert {name: info.shape for name, info in read_headers(tmp_path)[0].items()} == {"a": (1,), "b": (1,), "e": (0, 7)}


def test_a_file_that_is_a_directory(tmp_path: Path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
        read_headers(tmp_path)


def test_a_checkpoint_without_a_config(tmp_path: Path):
    (make_checkpoint(tmp_path) / "config.json").unlink()
    with pytest.raises(ModelConfigError, match="not found"):
        Checkpoint.open(tmp_path)


def test_a_directory_without_weights(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    assert failure(tmp_path) == f"{tmp_path}: has no *.safetensors file"


# --- several files and the index ------------------------------------------------------------------


def write_index(path: Path, weight_map: Any) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_several_files_need_no_index(tmp_path: Path):
    make_checkpoint(tmp_path, shards=3)
    (tmp_path / INDEX).unlink()
    assert len({info.file for info in Checkpoint.open(tmp_path).tensors.values()}) == 3


def test_a_tensor_in_two_files_needs_an_index(tmp_path: Path):
    for name in ("a", "b"):
        save_file({"x": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_headers(tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path}/b.safetensors: tensor x stands also in a.safetensors, and no index says which counts"
    )
    write_index(tmp_path, {"x": "b.safetensors"})
    assert read_headers(tmp_path)[0]["x"].file.name == "b.safetensors"


def test_only_files_that_the_index_names_are_read(tmp_path: Path):
    make_checkpoint(tmp_path, shards=2)
    (tmp_path / "consolidated.safetensors").write_bytes(b"garbage")
    Checkpoint.open(tmp_path)


def test_an_index_that_names_an_absent_file(tmp_path: Path):
    make_checkpoint(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert failure(tmp_path) == f"{tmp_path}/model-00002-of-00002.safetensors: is named by {INDEX} but is not there"


def test_an_index_that_names_an_absent_tensor(tmp_path: Path):
    make_checkpoint(tmp_path, shards=2)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    moved = (
        "model-00002-of-00002.safetensors"
        if weight_map[GATE].endswith("1-of-00002.safetensors")
        else "model-00001-of-00002.safetensors"
    )
    write_index(tmp_path, weight_map | {GATE: moved})
    assert failure(tmp_path) == f"{tmp_path}/{moved}: tensor {GATE} is in {INDEX} but not in the file"


@pytest.mark.parametrize(
    "name", ["../w.safetensors", "/w.safetensors", "sub/w.safetensors", "sub/../w.safetensors", "./w.safetensors", "."]
)
def test_an_index_cannot_lead_out_of_its_directory(tmp_path: Path, name: str):
    inner = tmp_path / "model"
    (inner / "sub").mkdir(parents=True)
    for place in (tmp_path, inner, inner / "sub"):
        save_file({"x": torch.zeros(2)}, place / "w.safetensors")
    write_index(inner, {"x": name})
    with pytest.raises(CheckpointError, match="must name files in the same directory"):
        read_headers(inner)


@pytest.mark.parametrize("name", ["..", "", "a\0b", "w" * 5000])
def test_an_index_with_impossible_file_names(tmp_path: Path, name: str):
    write_index(tmp_path, {"x": name})
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"x": ["a"]}}',
        '{"weight_map": {"x": "a.safetensors", "y": 1}}',
        "[" * 200_000,
    ],
    ids=["empty", "list", "no-map", "map-is-a-list", "file-is-a-list", "mixed", "deep"],
)
def test_an_index_that_is_none(tmp_path: Path, text: str):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="not a safetensors index with a weight_map"):
        read_headers(tmp_path)


def test_an_index_whose_file_names_are_numbers(tmp_path: Path):
    write_index(tmp_path, {"x": 1})
    with pytest.raises(CheckpointError, match="must name files"):
        read_headers(tmp_path)


# --- pickles --------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, name: str):
    """The file is a pipe that nobody writes to: whoever opens it hangs."""
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    os.mkfifo(tmp_path / name)
    assert failure(tmp_path) == (
        f"{tmp_path / name}: is a pickle, which can run code when it is loaded; convert the checkpoint to safetensors"
    )


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_a_pickle_in_disguise_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()) + bytes(100))
    assert "not a safetensors file" in failure(tmp_path)
    write_index(tmp_path, {"x": "pytorch_model.bin"})
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "not a safetensors file" in failure(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path):
    make_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "training_args.bin")
    Checkpoint.open(tmp_path)
    assert shard_files(tmp_path) == ([tmp_path / "model.safetensors"], None)


def test_specs_of_a_671b_model_are_quick():
    """The published DeepSeek-V3's sizes: 671 B parameters in 61 layers."""
    raw = make_config({
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    })  # fmt: skip
    specs: list[TensorSpec] = list(parse(raw).tensors())
    parameters = sum(s.shape[0] * (s.shape[1] if len(s.shape) > 1 else 1) for s in specs)
    assert round(parameters / 1e9) == 671  # as the model card counts it, without the MTP layer
    assert len(specs) == 58 * (256 * 3 + 3 + 2) + 3 * 3 + 61 * 9 + 3


def test_a_layer_that_drafts_and_is_not_whole_is_no_reason_not_to_serve(tmp_path: Path):
    def lose(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("eh_proj.weight") or (".layers.3." in n and ".experts.1." in n)]:
            del tensors[name]

    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, {"num_hidden_layers": 3}, mtp=True, change=lose))
    assert checkpoint.has_mtp and checkpoint.drafting("auto") == (checkpoint, "ngram")
    with pytest.raises(CheckpointError, match=r"layers\.3\..* is missing"):
        checkpoint.drafting("mtp")
    assert all(checkpoint.tensors_of(spec.name, spec.quantisable) for spec in checkpoint.weights())
