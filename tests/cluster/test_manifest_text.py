"""A manifest as it is written: no key twice, numbers as people write them, and a message that fits a screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from isotherm.cluster.manifest import ManifestError, load_manifest
from isotherm.cluster.manifest_text import decode


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("http: {keys: /k.json}\nhttp: {port: 9000}\n", "http"),  # would serve without the keys
        ("engine:\n  kv_memory: 1GiB\n  kv_memory: 2GiB\n", "kv_memory"),
        ("model: tiny\n'model': tiny\n", "model"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_both_places(tmp_path: Path, text: str, key: str):
    file = tmp_path / "m.yaml"
    file.write_text(text)
    with pytest.raises(ManifestError, match=f"{key} stands here") as caught:
        load_manifest(file)
    said = str(caught.value)
    assert said.startswith(f"{file}: ") and "and here again" in said and said.count(", line ") == 2


def test_one_key_in_several_sections_and_merged_ones_are_no_repetition():
    assert decode("a: &a {x: 1, y: 2}\nb: {x: 1, <<: *a}\nc: [{x: 1}, {x: 2}]") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 2}],
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000.0),
        ("1.5e-3", 0.0015),
        ("-2E+2", -200.0),
        ("1e", "1e"),
        ("e3", "e3"),
        ("0x1e3", 0x1E3),
        ("1e3s", "1e3s"),
    ],
)
def test_numbers_with_an_exponent_are_numbers(text: str, value: object):
    found = decode(text)
    assert found == value and type(found) is type(value)


def test_a_value_that_unfolds_to_very_much_is_shown_in_short(tmp_path: Path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 7)]
    (file := tmp_path / "m.yaml").write_text("\n".join([*lines, "model: *a6"]))
    with pytest.raises(ManifestError, match="model is") as caught:
        load_manifest(file)
    assert max(map(len, str(caught.value).splitlines())) < 1500
