"""What quantising loses: layer by layer, and in perplexity, against both worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.cli import quality
from isotherm.cluster.cli.quality import QualityError, layer_errors, layer_of, measure_quality, perplexity
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.slow

MANIFEST = parse_manifest({"dtype": "float32", "kernels": "reference"})


def test_the_error_of_a_layer_is_that_of_all_its_weights():
    checkpoint = Checkpoint.open(bundled_model())
    rows = layer_errors(checkpoint, WeightChoice("int4", head="int8"))
    assert [row["layer"] for row in rows] == ["1", "2", "3", "4", "lm_head"] and set(rows[0]) == {"layer", "experts"}
    lost = before = 0.0
    with WeightReader(checkpoint) as stored, WeightReader(checkpoint, WeightChoice("int4")) as chosen:
        for expert in range(checkpoint.config.n_routed_experts):
            for a, b in zip(stored.expert(2, expert), chosen.expert(2, expert), strict=True):
                x, y = (w.dequantise(torch.float32).double() for w in (a, b))
                lost, before = lost + float(((y - x) ** 2).sum()), before + float((x**2).sum())
    assert rows[1]["experts"] == pytest.approx(math.sqrt(lost / before), rel=1e-9)
    assert 0.04 < rows[1]["experts"] < 0.12 and rows[-1]["head"] < 0.01


def test_a_text_of_several_windows_is_the_mean_of_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quality, "WINDOW", 10)
    checkpoint, tokens = Checkpoint.open(bundled_model()), list(range(300, 321))  # the last window predicts nothing
    kernels = ReferenceKernels(torch.float32)
    first, second, whole = (
        math.log(perplexity(checkpoint, kernels, WeightChoice(), "auto", part))
        for part in (tokens[:10], tokens[10:20], tokens)
    )
    assert first != second and whole == pytest.approx((first + second) / 2, rel=1e-6)


def test_quality_of_the_bundled_model(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("What is 3 + 4?\n3 + 4 = 7.\nThe capital of Japan is Tokyo.\n")
    said: list[str] = []
    found = measure_quality(MANIFEST, bundled_model(), WeightChoice("int4", "int4"), "auto", text, said.append)
    stored, chosen = found["perplexity"]["stored"], found["perplexity"]["chosen"]
    assert 1 < stored < 100 and stored != chosen and abs(chosen / stored - 1) < 0.5 and len(said) == 4
    assert [row["layer"] for row in found["layers"]] == ["0", "1", "2", "3", "4"]
    with pytest.raises(QualityError, match="nothing is quantised; give --experts int4"):
        measure_quality(MANIFEST, bundled_model(), WeightChoice(), "auto", None, said.append)
    said.clear()
    for content, wrong in (
        (b"", "has 1 token"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (None, "cannot be read"),
    ):
        text.unlink() if content is None else text.write_bytes(content)
        with pytest.raises(QualityError, match=wrong):
            measure_quality(MANIFEST, bundled_model(), WeightChoice("int4"), "auto", text, said.append)
    assert not said, "no weight is read before"


def test_quality_of_a_cache_in_fp8(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("What is 3 + 4?\n3 + 4 = 7.\nThe capital of Japan is Tokyo.\n")
    said: list[str] = []
    found = measure_quality(MANIFEST, bundled_model(), WeightChoice(), "fp8", text, said.append)
    stored, chosen = found["perplexity"]["stored"], found["perplexity"]["chosen"]
    assert stored != chosen and abs(chosen / stored - 1) < 0.05
    assert (
        found["layers"] == [] and said[3] == f"computing {found['tokens']} tokens, weights as stored, KV cache as fp8"
    )


def test_layers_have_the_number_in_their_weights_names():
    assert layer_of("model.layers.12.mlp.experts.3.up_proj.weight") == "12" and layer_of("lm_head.weight") == "lm_head"
