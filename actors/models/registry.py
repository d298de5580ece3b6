"""The forward pass of each family of models, by the `model_type` of config.json."""

from __future__ import annotations

from collections.abc import Callable

from isotherm.actors.models.deepseek_v3 import DeepseekV3Model
from isotherm.actors.models.deepseek_v32 import DeepseekV32Model
from isotherm.actors.models.protocol import AttentionModel
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.config import ModelConfig, ModelConfigError
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.cluster.model.tensors import Part
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
    kv_cache_dtype: KvCacheDtype = "auto",
    progress: Callable[[float], None] = lambda _: None,
) -> AttentionModel:
    """The attention shard's part of the model, loaded. `progress` is told fractions. Raises ModelConfigError for a
    family that has no forward pass here."""
    try:
        family = FAMILIES[config.model_type]
    except KeyError:
        known = ", ".join(FAMILIES)
        raise ModelConfigError(f'model_type "{config.model_type}" has no forward pass; known here: {known}') from None
    wanted = [s.name for s in config.tensors() if s.quantisable and s.part is not Part.ROUTED_EXPERTS]
    with reader.ahead(wanted):
        return family(config, kernels, reader, max_positions, kv_cache_dtype=kv_cache_dtype, progress=progress)
