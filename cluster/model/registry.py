"""The families of models that can be served, by the `model_type` of config.json, and reading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.model.config import Fields, ModelConfig, ModelConfigError
from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config
from isotherm.cluster.model.deepseek_v32 import DeepseekV32Config
from isotherm.cluster.model.glm4_moe_lite import Glm4MoeLiteConfig
from isotherm.cluster.model.joyai_llm_flash import JoyAiLlmFlashConfig
from isotherm.cluster.model.kimi import KimiK2Config, KimiK25Config
from isotherm.cluster.model.relatives import MISTRAL_FORMAT, RELATIVES

MODELOPT = "hf_quant_config.json"  # where NVIDIA's ModelOpt says how it quantised; early versions say it nowhere else

# Each has its part of the forward pass in actors/models/registry.py.
FAMILIES: dict[str, type[ModelConfig]] = {
    "deepseek_v3": DeepseekV3Config,
    "deepseek_v32": DeepseekV32Config,
    "kimi_k2": KimiK2Config,
    "kimi_k25": KimiK25Config,
    "glm4_moe_lite": Glm4MoeLiteConfig,
    "joyai_llm_flash": JoyAiLlmFlashConfig,
}


def parse(raw: JSON, file: Path | str = "config.json") -> ModelConfig:
    """Check a decoded config.json. Raises ModelConfigError; a family that is not known is named, with those that
    are."""
    if not isinstance(raw, dict):
        raise ModelConfigError(f"{file}: must hold a JSON object, found {type(raw).__name__}")
    f = Fields(raw, str(file))
    if isinstance(kind := raw.get("model_type"), str) and kind in RELATIVES:
        known = " or ".join(f'"{family}"' for family in FAMILIES)
        raise ModelConfigError(
            f'{file}: model_type is "{kind}": {RELATIVES[kind]}. It is not supported; it must be {known}'
        )
    f.exactly("model_type", tuple(FAMILIES), None)
    family = FAMILIES[raw["model_type"]]
    return family(**family.read(f))


def load_config(path: Path) -> ModelConfig:
    """Read `path`/config.json, and what else says how the weights are stored. Raises ModelConfigError."""
    file = path / "config.json"
    try:
        raw = _read(file)
    except FileNotFoundError:
        if (path / "params.json").is_file():
            raise ModelConfigError(f"{path / 'params.json'}: {MISTRAL_FORMAT}") from None
        raise ModelConfigError(
            f"{file}: not found; a model directory has config.json, tokenizer.json (or tiktoken.model) and "
            "*.safetensors"
        ) from None
    config = parse(raw, file)
    if config.quantisation is None:
        _check_modelopt(path / MODELOPT)
    return config


def _check_modelopt(file: Path) -> None:
    """That ModelOpt left the weights as they were: its FP8 has one scale for a weight, or those of blocks in a shape of
    their own, and NVFP4 scales of scales, which nothing here reads. Raises ModelConfigError."""
    try:
        raw = _read(file)
    except FileNotFoundError:
        return
    said = raw.get("quantization") if isinstance(raw, dict) else None
    if isinstance(said, dict) and (kind := said.get("quant_algo")) is not None:
        allowed = "null: no format of ModelOpt's is read; docs/quantisation.md has those that are"
        raise Fields(said, f"{file}: quantization").fail("quant_algo", kind, allowed)


def _read(file: Path) -> Any:
    """JSON. Raises FileNotFoundError or ModelConfigError."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelConfigError(f"{file}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"{file}: not valid JSON ({error})") from None
