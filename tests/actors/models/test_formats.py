"""The next weight format: one that only this file knows is added as two classes and two entries, and its checkpoint is
served by every kernel. It is of the most demanding sort: 4 bits packed, several tensors a weight of which none has the
weight's own name, and parameters that stand in config.json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from deepseek_checkpoints import make_config, make_tensors, write_checkpoint
from native_there import require_native
from torch import Tensor

from isotherm.cluster.cli.offline import OfflineOptions, generate_offline
from isotherm.cluster.deploy.capacity import check_machine
from isotherm.cluster.deploy.inspect import inspect_model
from isotherm.cluster.manifest import Manifest, ManifestError, parse_manifest
from isotherm.cluster.model.checkpoint import Checkpoint, CheckpointError
from isotherm.cluster.model.config import Fields, ModelConfigError
from isotherm.cluster.model.formats import registry as stored_formats
from isotherm.cluster.model.formats.base import FLOATS, Wanted, WeightFormat
from isotherm.cluster.model.formats.plain import Plain
from isotherm.cluster.model.registry import parse
from isotherm.kernels.formats import registry as kernel_formats
from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.published import PUBLISHED
from isotherm.kernels.formats.stored import PlainWeight, StoredWeight

GATE = "model.layers.0.mlp.gate_proj"
PROMPT = "5,250,17,99,4,123"


# --- the format -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyFour(WeightFormat):
    """What is stored: (code - zero) × scale, with scale and zero for each `group_size` inputs of an output."""

    group_size: int = 32

    name = "toy4"
    leaves: ClassVar = {"packed": "qweight", "scale": "scales", "zero": "qzeros", "shape": "weight_shape"}
    quant_methods = ("grouped-int4",)
    needs_config = True

    @classmethod
    def configured(cls, q: Fields) -> ToyFour:
        q.exactly("bits", (4,), None)
        return cls(q.integer("group_size"))

    def words(self) -> str:
        return f"4-bit integers, groups of {self.group_size}"

    def wants(self, shape: tuple[int, ...]) -> dict[str, Wanted]:
        groups = (shape[0], -(-shape[1] // self.group_size))
        return {
            "packed": Wanted((shape[0], -(-shape[1] // 2)), ("U8",)),
            "scale": Wanted(groups, tuple(FLOATS)),
            "zero": Wanted(groups, ("U8",)),
            "shape": Wanted((2,), ("I64",)),
        }

    def stores(self, dtypes: Mapping[str, str]) -> bool:
        return "packed" in dtypes


class ToyWeight(StoredWeight):
    """What is computed."""

    name = "toy4"

    def __init__(self, tensors: Mapping[str, Tensor], group_size: int):
        self.parts, self.group_size = tensors, group_size

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> ToyWeight:
        return cls(tensors, parameters["group_size"])

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.parts["shape"].tolist()
        return rows, columns

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.parts.values())

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        packed, columns = self.parts["packed"], self.shape[1]
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :columns]
        scale, zero = (
            self.parts[role].float().repeat_interleave(self.group_size, 1)[:, :columns] for role in ("scale", "zero")
        )
        return ((codes.float() - zero) * scale).to(dtype)


# --- its checkpoints ------------------------------------------------------------------------------


def quantise(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * group_size - columns)).view(rows, groups, group_size)
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-8)
    zero = (-low / scale).round().clamp(0, 15)
    codes = (padded / scale[..., None] + zero[..., None]).round().clamp(0, 15).to(torch.uint8).flatten(1)[:, :columns]
    even = torch.nn.functional.pad(codes, (0, columns % 2))
    return {"packed": even[:, ::2] | even[:, 1::2] << 4, "scale": scale, "zero": zero.to(torch.uint8),
            "shape": torch.tensor([rows, columns])}  # fmt: skip


def written(path: Path, group_size: int = 32) -> tuple[Path, Path]:
    """Two checkpoints of one model: in 4 bits, and with the numbers that those stand for."""
    config = make_config({"max_position_embeddings": 64})
    numbers = make_tensors(config, 3)
    quantised = dict(numbers)
    for spec in parse(config).tensors():
        if spec.quantisable:
            parts = quantise(numbers[spec.name], group_size)
            del quantised[spec.name]
            quantised |= {ToyFour.tensor_name(spec.name, role): tensor for role, tensor in parts.items()}
            numbers[spec.name] = ToyWeight(parts, group_size).dequantise(torch.float32)
    claimed = config | {"quantization_config": {"quant_method": "grouped-int4", "bits": 4, "group_size": group_size}}
    narrow = write_checkpoint(path / "int4", claimed, quantised, shards=2)
    return narrow, write_checkpoint(path / "f32", config, numbers)


@pytest.fixture
def int4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_formats, "FORMATS", [*stored_formats.FORMATS, ToyFour])
    monkeypatch.setitem(kernel_formats.FORMATS, ToyFour.name, ToyWeight)


# --- what it is given for that --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.usefixtures("int4")
def test_it_generates_what_its_numbers_do(tmp_path: Path, kernels: str, dtype: str):
    if kernels == "native":
        require_native()
    options = OfflineOptions(
        prompt=None, prompt_ids=PROMPT, chat=None, max_tokens=8, temperature=0.0, top_p=1.0, top_k=0, seed=0,
        ignore_eos=True, dtype=dtype, kernels=kernels, logprobs=3,
    )  # fmt: skip
    quantised, numbers = (generate_offline(Manifest(), path, options) for path in written(tmp_path))
    assert (quantised["token_ids"], quantised["logprobs"]) == (numbers["token_ids"], numbers["logprobs"])
    assert len(set(quantised["token_ids"])) > 2
    assert quantised["system_fingerprint"] != numbers["system_fingerprint"]


@pytest.mark.usefixtures("int4")
def test_it_is_inspected_and_its_memory_counted(tmp_path: Path):
    quantised, numbers = written(tmp_path)
    report, wide = inspect_model(quantised, Manifest()), inspect_model(numbers, Manifest())
    assert report.architecture["weights"] == "4-bit integers, groups of 32" and report.parameters == wide.parameters
    checkpoint = Checkpoint.open(quantised)
    assert sum(report.bytes_by_part.values()) == sum(info.nbytes for info in checkpoint.tensors.values())
    for file in quantised.glob("*.safetensors"):  # by the index alone, bytes are estimated
        file.unlink()
    estimate = inspect_model(quantised, Manifest())
    assert estimate.architecture["weights"] == report.architecture["weights"]
    each = 3 * 16 * len(checkpoint.config.moe_layers) * checkpoint.config.n_routed_experts  # of weight_shape
    assert estimate.bytes_by_part["routed experts"] == report.bytes_by_part["routed experts"] > each


@pytest.mark.usefixtures("int4")
def test_what_it_takes_in_memory_is_what_its_numbers_do(tmp_path: Path):
    """It has no tiles of its own, so it is widened to bf16, as the others are."""
    manifest = parse_manifest({"engine": {"kv_memory": "1MiB"}})
    for path in written(tmp_path):
        elements = sum(inspect_model(path, manifest).parameters_by_part.values())
        check_machine(manifest, path, int(elements * 1.49) + (1 << 20), 16)
        with pytest.raises(ManifestError, match="this machine has"):
            check_machine(manifest, path, int(elements * 1.47) + (1 << 20), 16)


@pytest.mark.usefixtures("int4")
def test_parameters_are_part_of_what_the_weights_are(tmp_path: Path):
    quantised, _ = written(tmp_path)
    checkpoint = Checkpoint.open(quantised)
    other = replace(checkpoint, config=replace(checkpoint.config, quantisation=ToyFour(64)))
    assert checkpoint.config.quantisation == ToyFour(32) and checkpoint.digest() != other.digest()


@pytest.mark.usefixtures("int4")
def test_a_checkpoint_that_lacks_a_tensor_of_it_is_refused(tmp_path: Path):
    quantised, _ = written(tmp_path)
    index = quantised / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"][f"{GATE}.qzeros"]
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=rf"tensor {GATE}.qweight: is U8, but {GATE}.qzeros is missing; expected"):
        Checkpoint.open(quantised)


def test_an_unknown_format_is_refused_by_name(tmp_path: Path, request: pytest.FixtureRequest):
    quantised, _ = written(tmp_path)
    with pytest.raises(ModelConfigError, match='quant_method is "grouped-int4"; it must be "fp8" or .*"quark"$'):
        Checkpoint.open(quantised)
    request.getfixturevalue("int4")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "awq"
    with pytest.raises(
        ModelConfigError, match='quant_method is "awq"; it must be "fp8" or .*"quark" or "grouped-int4"$'
    ):
        parse(config)
    with pytest.raises(
        ValueError, match='weight format "awq" has no kernels; known are plain, fp8, int4, int6, int8, toy4'
    ):
        kernel_formats.stored_weight("awq", {}, {})


@pytest.mark.usefixtures("int4")
def test_it_can_be_cut_turned_and_requantised():
    weight = torch.randn(300, 130, generator=torch.Generator().manual_seed(1))
    stored = ToyWeight(quantise(weight, 32), 32)
    numbers = stored.dequantise(torch.float32)
    torch.testing.assert_close(numbers, weight, rtol=0, atol=0.3)
    assert torch.equal(stored.rows(3, 40, torch.float32).dequantise(torch.float32), numbers[3:40])
    assert torch.equal(stored.transpose(torch.float32).dequantise(torch.float32), numbers.T)
    narrow = kernel_formats.quantised("fp8", stored)
    assert isinstance(narrow, Fp8Weight) and torch.equal(
        narrow.dequantise(torch.float32), Fp8Weight.quantise(PlainWeight(numbers)).dequantise(torch.float32)
    )
    with pytest.raises(TypeError, match="cannot be quantised to toy4 here"):
        kernel_formats.quantised("toy4", stored)


def test_what_can_be_stored_can_be_computed():
    stored: list[type[WeightFormat]] = [Plain, *stored_formats.FORMATS]
    assert {f.name for f in stored} <= set(kernel_formats.FORMATS) | set(PUBLISHED)
