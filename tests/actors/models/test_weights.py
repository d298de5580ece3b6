"""Reading weights: what was read does not stay in this process's memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from isotherm.actors.models import weights
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model


def mapped_and_touched(file: Path) -> int:
    """Bytes of a file that count as this process's memory now."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(file.resolve()))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> WeightReader:
    monkeypatch.setattr(weights, "MAPPED_BYTES", 1 << 20)
    return WeightReader(Checkpoint.open(bundled_model()))


@pytest.mark.slow
def test_what_was_read_goes_again(reader: WeightReader):
    file = next(iter({t.file for t in reader.checkpoint.tensors.values()}))
    largest = max(t.nbytes for t in reader.checkpoint.tensors.values())
    most = 0
    with reader:
        for i, name in enumerate(reader.checkpoint.tensors):
            reader.tensor(name).view(torch.uint8).sum()
            if i % 9 == 0:  # looking costs 10 ms
                most = max(most, mapped_and_touched(file))
    # What may stay mapped, the tensor that is being read, and up to 64 KiB around each that the system brings with it.
    assert (1 << 20) // 2 < most <= (1 << 20) + largest + (256 << 10)
    assert reader.bytes_read > 10 * (1 << 20)
    assert mapped_and_touched(file) == 0


def test_a_view_outlives_the_mapping_it_was_read_from(reader: WeightReader):
    name = "model.layers.0.self_attn.o_proj.weight"
    with reader:
        view = reader.tensor(name)
        before = view.view(torch.uint8).clone()
        for other in reader.checkpoint.tensors:
            reader.tensor(other)
    assert torch.equal(view.view(torch.uint8), before)
