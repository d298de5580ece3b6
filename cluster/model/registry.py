"""The families of models that can be served, by the `model_type` of config.json, and reading it."""

from __future__ import annotations

import json
from pathlib import Path

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.model.config import Fields, ModelConfig, ModelConfigError
from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config

# Each has its part of the forward pass in actors/models/registry.py.
FAMILIES: dict[str, type[ModelConfig]] = {"deepseek_v3": DeepseekV3Config}
NOT_YET = {
    "kimi_k2": "Kimi K2 is not supported yet",
    "deepseek_v32": "DeepSeek-V3.2's sparse attention is not supported yet",
}


def parse(raw: JSON, file: Path | str = "config.json") -> ModelConfig:
    """Check a decoded config.json. Raises ModelConfigError; a family that is not known is named, with those that
    are."""
    if not isinstance(raw, dict):
        raise ModelConfigError(f"{file}: must hold a JSON object, found {type(raw).__name__}")
    f = Fields(raw, str(file))
    if isinstance(kind := raw.get("model_type"), str) and kind in NOT_YET:
        known = " or ".join(f'"{family}"' for family in FAMILIES)
        raise ModelConfigError(f'{file}: model_type is "{kind}": {NOT_YET[kind]}; it must be {known}')
    f.exactly("model_type", tuple(FAMILIES), None)
    family = FAMILIES[raw["model_type"]]
    return family(**family.read(f))


def load_config(path: Path) -> ModelConfig:
    """Read `path`/config.json. Raises ModelConfigError."""
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise ModelConfigError(
            f"{file}: not found; a model directory has config.json, tokenizer.json and *.safetensors"
        ) from None
    except OSError as error:
        raise ModelConfigError(f"{file}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"{file}: not valid JSON ({error})") from None
    return parse(raw, file)
