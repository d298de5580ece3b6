"""In what a checkpoint may differ from the one whose place it takes, and in what it may not."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.model.sameness import TEXT_FILES, differences


@pytest.fixture
def now() -> Checkpoint:
    return Checkpoint.open(bundled_model())


@pytest.fixture
def then(now: Checkpoint, tmp_path: Path) -> Checkpoint:
    """The same at another place, with its own files."""
    for name in (*TEXT_FILES, "generation_config.json"):
        if (bundled_model() / name).exists():
            (tmp_path / name).write_bytes((bundled_model() / name).read_bytes())
    return replace(now, path=tmp_path)


def test_the_same_does_not_differ(now: Checkpoint, then: Checkpoint):
    tokenizer = then.path / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=3))  # other spaces
    stored = replace(then, config=replace(then.config, stored_dtype="float16"))
    assert differences(now, stored, True) == []


def test_every_field_is_named(now: Checkpoint, then: Checkpoint):
    config = replace(then.config, hidden_size=96, eos_token_ids=(7,))
    assert differences(now, replace(then, config=config), True) == [
        f"config.json: hidden_size is 96, not {now.config.hidden_size}",
        f"config.json: eos_token_ids is (7,), not {now.config.eos_token_ids!r}",
    ]


def test_another_family_is_said_alone(now: Checkpoint, then: Checkpoint):
    class Other(type(then.config)):  # type: ignore[misc]
        pass

    values = {name: getattr(then.config, name) for name in (field.name for field in fields(then.config))}
    other = Other(**values | {"model_type": "other"})
    assert differences(now, replace(then, config=other), True) == ["config.json: model_type is other, not deepseek_v3"]


@pytest.mark.parametrize("defaults_matter", [True, False])
def test_other_ends_of_a_text(now: Checkpoint, then: Checkpoint, defaults_matter: bool):
    """The front door keeps the set that it has read."""
    file = then.path / "generation_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"eos_token_id": [*now.config.eos_token_ids, 7]}))
    words = f"generation_config.json: eos_token_id is {[*now.config.eos_token_ids, 7]}, not {[said['eos_token_id']]}"
    assert differences(now, then, defaults_matter) == [words]
    del said["eos_token_id"]  # config.json names it
    file.write_text(json.dumps(said))
    assert differences(now, then, defaults_matter) == []


def test_texts_and_defaults(now: Checkpoint, then: Checkpoint):
    (then.path / "tokenizer.json").unlink()
    (then.path / "chat_template.json").write_text("{}")
    (then.path / "additional_chat_templates").mkdir()
    (then.path / "additional_chat_templates" / "rag.jinja").write_text("")
    (then.path / "generation_config.json").write_text('{"temperature": 0.25, "transformers_version": "9"}')
    found = differences(now, then, True)
    assert found[:3] == [
        "tokenizer.json is missing",
        "chat_template.json is there, and was not",
        "additional_chat_templates/rag.jinja is there, and was not",
    ]
    assert any("temperature is 0.25" in words for words in found[3:])
    assert differences(now, then, False) == found[:3]
