"""Reading weights: what is read ahead and what is not give the same; only what is kept stays in memory; and what is
quantised while it is read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from safetensors.torch import load_file

from isotherm.actors.models import weights
from isotherm.actors.models.registry import load_model
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.checkpoint import Checkpoint, CheckpointError
from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.model.tensors import Part
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.registry import quantised
from isotherm.kernels.reference import ReferenceKernels

HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(bundled_model())


def projections(checkpoint: Checkpoint) -> list[str]:
    return [spec.name for spec in checkpoint.config.tensors() if spec.quantisable]


def test_tensors_are_those_of_the_file(checkpoint: Checkpoint):
    with WeightReader(checkpoint) as reader:
        for file in {info.file for info in checkpoint.tensors.values()}:
            for name, tensor in load_file(file).items():
                found = reader.tensor(name)
                assert found.dtype == tensor.dtype and found.shape == tensor.shape
                assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
    assert reader.bytes_read == sum(info.nbytes for info in checkpoint.tensors.values())


def test_a_tensor_in_blocks_is_the_same(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    with WeightReader(checkpoint) as reader:
        blocks = [bytes(block) for block in reader.blocks(HEAD)]
        assert len(blocks) > 5 and b"".join(blocks) == bytes(reader.tensor(HEAD).flatten().view(torch.uint8).numpy())


def test_tensors_are_compared_in_blocks_as_far_as_they_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An embedding of DeepSeek-V3 has 1.85 GB, and each shard compares it and the head with the MTP layer's."""
    own = "model.layers.3"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{own}.embed_tokens.weight"][0, 0] += 1

    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, mtp=True, change=change)).with_mtp()
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    monkeypatch.delattr(WeightReader, "tensor")  # which reads one whole
    with WeightReader(checkpoint) as reader:
        assert reader.are_equal(f"{own}.shared_head.head.weight", HEAD)
        assert reader.bytes_read == 2 * checkpoint.tensors[HEAD].nbytes > 50_000
        assert not reader.are_equal(f"{own}.embed_tokens.weight", "model.embed_tokens.weight")
        assert reader.bytes_read == 2 * checkpoint.tensors[HEAD].nbytes + 2 * 1000


@pytest.mark.parametrize("room", [1, 200_000, weights.AHEAD_BYTES])
def test_reading_ahead_gives_the_same_in_any_order(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, room: int):
    monkeypatch.setattr(weights, "AHEAD_BYTES", room)
    monkeypatch.setattr(weights, "LEAST_AHEAD_BYTES", room)
    names = projections(checkpoint)[:60]
    with WeightReader(checkpoint) as alone, WeightReader(checkpoint) as reader:
        with reader.ahead(names[:-10]):  # the last ones were not told
            for name in [*names[30:], *names[:30]]:
                assert torch.equal(reader.stored(name).tensors[0].float(), alone.stored(name).tensors[0].float()), name
        assert reader._room == room and not reader._under_way and not reader._waiting


def test_a_small_worker_reads_little_ahead(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "LEAST_AHEAD_BYTES", 1000)
    names = projections(checkpoint)
    with WeightReader(checkpoint) as reader, reader.ahead(names):
        under_way = sum(size for _, size in reader._under_way.values())
        whole = under_way + sum(reader._waiting.values())
        assert 0 < under_way < whole * weights.AHEAD_SHARE + max(map(reader._nbytes, names))


def test_whether_weights_are_cached_is_known_without_reading(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    names = projections(checkpoint)[:3]
    with WeightReader(checkpoint) as reader:
        for name in names:
            reader.stored(name)
        read = reader.bytes_read
        assert reader.is_cached(names) and reader.bytes_read == read
        asked = []

        def away(file: int, buffers: list, offset: int, flags: int) -> int:
            asked.append(flags)
            raise BlockingIOError

        monkeypatch.setattr(os, "preadv", away)
        assert not reader.is_cached(names) and asked == [os.RWF_NOWAIT]
        monkeypatch.delattr(os, "RWF_NOWAIT")
        assert not reader.is_cached(names)


def test_what_was_read_ahead_and_not_taken_is_let_go(checkpoint: Checkpoint):
    names = projections(checkpoint)
    with WeightReader(checkpoint) as reader:
        with pytest.raises(RuntimeError, match="no slot"), reader.ahead(names):
            reader.stored(names[0])
            raise RuntimeError("no slot")
        assert reader._room == weights.LEAST_AHEAD_BYTES
        reader.stored(names[1])


def test_a_file_that_has_lost_its_end_is_named(tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(bundled_model(), model)
    checkpoint = Checkpoint.open(model)
    for file in model.glob("*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)
    names, words = projections(checkpoint), r"\.safetensors: tensor \S+ cannot be read \(it ends \d+ bytes too"
    with WeightReader(checkpoint) as reader, pytest.raises(CheckpointError, match=words), reader.ahead(names):
        for name in names:
            reader.stored(name)


@pytest.mark.parametrize("head", ["int8", "int6", "int4"])
def test_weights_are_quantised_as_their_part_is_chosen(checkpoint: Checkpoint, head: str):
    choice = WeightChoice(experts="int4", dense="fp8", head=head)
    forms = {Part.ROUTED_EXPERTS: "int4", Part.HEAD: head}
    seen = set()
    with WeightReader(checkpoint) as plain, WeightReader(checkpoint, choice) as reader:
        for spec in [s for s in checkpoint.config.tensors() if s.quantisable][::7] + [
            s for s in checkpoint.config.tensors() if s.name == HEAD
        ]:
            form = forms.get(spec.part, "fp8")
            found, expected = reader.stored(spec.name), quantised(form, plain.stored(spec.name))
            assert found.name == form and torch.equal(
                found.dequantise(torch.float32), expected.dequantise(torch.float32)
            )
            seen.add(form)
        assert seen == {"int4", "fp8", head}
        assert reader.head("model.embed_tokens.weight").name == head  # of a model whose head is its embedding
        assert plain.head(HEAD).name == plain.stored(HEAD).name


@pytest.mark.parametrize("converted", [False, True])
def test_what_absorbed_attention_multiplies_by_has_four_bits_both_ways(
    checkpoint: Checkpoint, tmp_path: Path, converted: bool
):
    from isotherm.actors.models.converter import convert

    choice = WeightChoice(dense="int4")
    if converted:
        convert(bundled_model(), tmp_path, choice)
        checkpoint, choice = Checkpoint.open(tmp_path), WeightChoice()
    name = next(spec.name for spec in checkpoint.config.tensors() if spec.both_ways)
    c = checkpoint.config
    assert isinstance(c, DeepseekV3Config)
    with WeightReader(checkpoint, choice) as reader:
        weight = reader.stored(name)
    for head in weight.cut(c.qk_nope_head_dim + c.v_head_dim, torch.bfloat16):
        keys = head.rows(0, c.qk_nope_head_dim, torch.bfloat16)
        turned = keys.transpose(torch.bfloat16)
        assert keys.name == turned.name == "int4"
        assert torch.equal(turned.dequantise(torch.float32), keys.dequantise(torch.float32).T)


def test_what_has_four_bits_gains_nothing_from_eight(checkpoint: Checkpoint, tmp_path: Path):
    from isotherm.actors.models.converter import convert

    convert(bundled_model(), tmp_path, WeightChoice(dense="int4"))
    narrow = Checkpoint.open(tmp_path)
    name = next(s.name for s in narrow.config.tensors() if s.part is Part.SHARED_EXPERTS)
    with WeightReader(narrow, WeightChoice(dense="fp8")) as reader:
        assert reader.stored(name).name == "int4"


def test_what_heads_are_cut_out_of_is_dequantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And not for each head, where their rows are no whole blocks of scales."""
    checkpoint = Checkpoint.open(
        make_checkpoint(tmp_path, {"num_attention_heads": 6, "num_key_value_heads": 6}, fp8=True)
    )
    c, dequantise, shapes = checkpoint.config, Fp8Weight.dequantise, []

    def counted(self: Fp8Weight, dtype: torch.dtype) -> torch.Tensor:
        shapes.append(self.shape)
        return dequantise(self, dtype)

    monkeypatch.setattr(Fp8Weight, "dequantise", counted)
    with WeightReader(checkpoint) as reader:
        load_model(c, ReferenceKernels(torch.float32), reader, 64)
    of_heads = shapes.count((6 * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank))
    assert of_heads == 2 * c.num_hidden_layers  # once more each to be packed whole, which the reference does wide
