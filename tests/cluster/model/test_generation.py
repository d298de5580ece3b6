"""What generation_config.json says of sampling."""

from __future__ import annotations

import json

import pytest

from isotherm.cluster.model.config import ModelConfigError
from isotherm.cluster.model.generation import generation_defaults, generation_ends


def written(path, content):
    (path / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_what_is_known_is_taken(tmp_path):
    """DeepSeek-R1's, with more."""
    content = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6}
    content |= {"top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1, "max_new_tokens": 9, "min_p": None}
    expected = {"temperature": 0.6, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1, "max_tokens": 9}
    assert generation_defaults(written(tmp_path, content)) == expected


def test_without_one_there_are_none(tmp_path):
    assert generation_defaults(tmp_path) == {}


@pytest.mark.parametrize(("said", "ends"), [(3, (3,)), ([3, 5], (3, 5)), (None, ())])
def test_what_ends_a_text(tmp_path, said, ends):
    assert generation_ends(tmp_path) == ()
    assert generation_ends(written(tmp_path, {"eos_token_id": said})) == ends
    with pytest.raises(ModelConfigError, match=r"generation_config\.json: eos_token_id is 'x'; it must be a token id"):
        generation_ends(written(tmp_path, {"eos_token_id": "x"}))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"temperature": "hot"}, 'temperature is "hot"; it must be a number of at least 0'),
        ({"temperature": 2.5}, "temperature is 2.5; it must be between 0 and 2"),
        ({"top_p": -1}, "top_p is -1; it must be a number of at least 0"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be an integer of at least -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0; it must be between 1e-06 and 2"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be an integer of at least 1"),
        ([], "must hold a JSON object, found list"),
        ("{", "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, content, says):
    with pytest.raises(ModelConfigError, match="generation_config.json: ") as info:
        generation_defaults(written(tmp_path, content))
    assert says in str(info.value)
