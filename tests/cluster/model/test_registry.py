"""Reading config.json, and which families of models there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from deepseek_checkpoints import make_config
from toy_family import MODEL_TYPE, ToyConfig

from isotherm.cluster.model.config import ModelConfigError
from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config
from isotherm.cluster.model.registry import FAMILIES, load_config, parse
from isotherm.cluster.model.relatives import RELATIVES


def test_the_family_is_that_of_the_model_type():
    assert type(parse(make_config())) is DeepseekV3Config is FAMILIES["deepseek_v3"]


@pytest.mark.parametrize("model_type", sorted(RELATIVES))
def test_a_relative_that_is_not_supported_is_named_with_the_reason(model_type: str):
    with pytest.raises(ModelConfigError) as caught:
        parse(make_config({"model_type": model_type}), "c.json")
    message = str(caught.value)
    assert message.startswith(f'c.json: model_type is "{model_type}": ') and RELATIVES[model_type] in message
    assert message.endswith("It is not supported; it must be " + " or ".join(f'"{name}"' for name in FAMILIES))


def test_no_family_is_refused_as_a_relative():
    assert not FAMILIES.keys() & RELATIVES.keys()


def test_a_family_that_is_not_known_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ModelConfigError) as caught:
        parse(make_config({"model_type": "llama"}), "c.json")
    known = " or ".join(f'"{name}"' for name in FAMILIES)
    assert str(caught.value) == f'c.json: model_type is "llama"; it must be {known}'
    monkeypatch.setitem(FAMILIES, MODEL_TYPE, ToyConfig)
    assert isinstance(parse(make_config({"model_type": MODEL_TYPE, "logit_scale": 0.5})), ToyConfig)
    for model_type in ("llama", "kimi_linear"):
        with pytest.raises(ModelConfigError, match=f'it must be {known} or "toy_moe"'):
            parse(make_config({"model_type": model_type}))


def test_mistrals_own_format_is_named(tmp_path: Path):
    """Mistral Large 3 is published in it too: its names are of their own."""
    (tmp_path / "params.json").write_text('{"dim": 7168}')
    with pytest.raises(ModelConfigError, match=r"params\.json: is a checkpoint in Mistral's own format"):
        load_config(tmp_path)


@pytest.mark.parametrize("raw", [[], "deepseek_v3", 3, None])
def test_a_config_that_is_no_object_is_refused(raw: Any):
    with pytest.raises(ModelConfigError, match=r"config\.json: must hold a JSON object"):
        parse(raw)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe{}", b"{'model_type': 1}", b"[" * 200_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "not-utf8", "not-json", "deep", "long-number"],
)
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, text: bytes):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelConfigError, match=r"config\.json: not valid JSON"):
        load_config(tmp_path)


def test_an_absent_or_unreadable_file_is_named(tmp_path: Path):
    with pytest.raises(ModelConfigError, match=rf"{tmp_path}/config\.json: not found; a model directory has"):
        load_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelConfigError, match=rf"{tmp_path}/config\.json: cannot be read"):
        load_config(tmp_path)


def test_a_good_file_is_read(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    assert load_config(tmp_path) == parse(make_config())


# --- ModelOpt -------------------------------------------------------------------------------------


def with_modelopt(path: Path, algorithm: str | None, config: dict[str, Any]) -> Path:
    said = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    (path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": said}))
    return path


@pytest.mark.parametrize("algorithm", ["NVFP4", "FP8", "FP8_PB_WO", "MIXED_PRECISION"])
def test_what_modelopt_quantised_is_refused(tmp_path: Path, algorithm: str):
    """nvidia/DeepSeek-R1-NVFP4 says it in this file alone: config.json is the original's without its FP8."""
    where = re.escape(f"{tmp_path}/hf_quant_config.json")
    words = f'quantization: quant_algo is "{algorithm}"; it must be null: no format of ModelOpt\'s is read'
    with pytest.raises(ModelConfigError, match=f"^{where}: {words}"):
        load_config(with_modelopt(tmp_path, algorithm, make_config()))


def test_what_modelopt_left_as_it_was_is_read(tmp_path: Path):
    assert load_config(with_modelopt(tmp_path, None, make_config())) == parse(make_config())
    fp8 = make_config(fp8=True)
    assert load_config(with_modelopt(tmp_path, "NVFP4", fp8)) == parse(fp8), "config.json's own word comes first"
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    for other in ("[]", "{}", '{"quantization": null}'):
        (tmp_path / "hf_quant_config.json").write_text(other)
        assert load_config(tmp_path) == parse(make_config())
    (tmp_path / "hf_quant_config.json").write_text("{")
    with pytest.raises(ModelConfigError, match=r"hf_quant_config\.json: not valid JSON"):
        load_config(tmp_path)
