"""Whether one checkpoint can take the place of another under a front door that goes on: the same architecture, the same
tokens. Reads descriptions, no weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from isotherm.cluster.model.checkpoint import NO_NUMERICS, Checkpoint
from isotherm.cluster.model.config import ModelConfig
from isotherm.cluster.model.generation import generation_defaults, generation_ends

# Of ModelConfig: what no logit depends on, but for what a front door and a placement are made for: where a text ends,
# and the layers that draft.
MAY_DIFFER = NO_NUMERICS - {"eos_token_ids", "drafting_layers"}
# What makes tokens of text and messages, and text of tokens
TEXT_FILES = (
    "tokenizer.json",
    "tiktoken.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def differences(now: Checkpoint, then: Checkpoint, defaults_matter: bool) -> list[str]:
    """In what `then` differs from `now` so that it cannot take its place, each with its file and field, or empty.
    `defaults_matter`: of sampling, in generation_config.json. Raises OSError, ModelConfigError."""
    return [
        *_of_configs(now.config, then.config),
        *_of_texts(now.path, then.path),
        *_of_ends(now, then),
        *(_of_defaults(now.path, then.path) if defaults_matter else ()),
    ]


def _of_configs(now: ModelConfig, then: ModelConfig) -> Iterator[str]:
    if type(now) is not type(then):
        yield f"config.json: model_type is {then.model_type}, not {now.model_type}"
        return
    for field in fields(now):
        has, has_had = getattr(then, field.name), getattr(now, field.name)
        if field.name not in MAY_DIFFER and has != has_had:
            yield f"config.json: {field.name} is {has!r}, not {has_had!r}"


def _of_texts(now: Path, then: Path) -> Iterator[str]:
    beside = {path.relative_to(one) for one in (now, then) for path in one.glob("additional_chat_templates/*.jinja")}
    for name in (*TEXT_FILES, *map(str, sorted(beside))):
        has_had, has = _content(now / name), _content(then / name)
        if has is None and has_had is not None:
            yield f"{name} is missing"
        elif has is not None and has_had is None:
            yield f"{name} is there, and was not"
        elif has != has_had:
            yield f"{name} is another"


def _of_ends(now: Checkpoint, then: Checkpoint) -> Iterator[str]:
    """The front door ends a text at what either config.json or generation_config.json names. That the first names the
    same is another's to say."""
    has_had, has = generation_ends(now.path), generation_ends(then.path)
    if {*has, *now.config.eos_token_ids} != {*has_had, *now.config.eos_token_ids}:
        yield f"generation_config.json: eos_token_id is {list(has)}, not {list(has_had)}"


def _content(path: Path) -> Any:
    """What a file says, whatever spaces it has; None where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return json.loads(content) if path.suffix == ".json" else content
    except ValueError:
        return content


def _of_defaults(now: Path, then: Path) -> Iterator[str]:
    has_had, has = generation_defaults(now), generation_defaults(then)
    for name in sorted({*has_had, *has}):
        if has_had.get(name) != has.get(name):
            yield f"generation_config.json: {name} is {has.get(name)}, not {has_had.get(name)}"
