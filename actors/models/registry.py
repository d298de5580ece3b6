"""The forward pass of each family of models, by the `model_type` of config.json."""

from __future__ import annotations

from collections.abc import Callable

from isotherm.actors.models.deepseek_v3 import DeepseekV3Model
from isotherm.actors.models.deepseek_v32 import DeepseekV32Model
from isotherm.actors.models.protocol import AttentionModel
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.config import ModelConfig, ModelConfigError
from isotherm.kernels.ops import Kernels

# Each has its config.json and its tensors in cluster/model/registry.py.
FAMILIES: dict[str, Callable[..., AttentionModel]] = {
    "deepseek_v3": DeepseekV3Model,
    "deepseek_v32": DeepseekV32Model,
    "kimi_k2": DeepseekV3Model,
    "kimi_k25": DeepseekV3Model,
    "glm4_moe_lite": DeepseekV3Model,
    "joyai_llm_flash": DeepseekV3Model,
}


def load_model(
    config: ModelConfig,
    kernels: Kernels,
    reader: WeightReader,
    max_positions: int,
    *,
    progress: Callable[[float], None] = lambda _: None,
    head: str = "stored",
) -> AttentionModel:
    """The attention shard's part of the model, loaded. `progress` is told fractions; `head`: the output projection as
    it is "stored", or in "fp8" blocks. Raises ModelConfigError for a family that has no forward pass here."""
    try:
        family = FAMILIES[config.model_type]
    except KeyError:
        known = ", ".join(FAMILIES)
        raise ModelConfigError(f'model_type "{config.model_type}" has no forward pass; known here: {known}') from None
    return family(config, kernels, reader, max_positions, progress=progress, head=head)
