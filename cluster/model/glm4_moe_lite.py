"""A `glm4_moe_lite` checkpoint (GLM-4.7-Flash): DeepSeek-V3's architecture, whose dense layers are named one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.model.config import Fields
from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config

DENSE, SPARSE = "dense", "sparse"


@dataclass(frozen=True, kw_only=True)
class Glm4MoeLiteConfig(DeepseekV3Config):
    """`mlp_layer_types` says which layers have routed experts; where it is absent, `first_k_dense_replace` does."""

    label: ClassVar[str] = "GLM-4.7-Flash"
    defaults: ClassVar[Mapping[str, Any]] = {
        **DeepseekV3Config.defaults,
        "q_lora_rank": 768,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 202752,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.8,
    }

    mlp_layer_types: tuple[str, ...]

    @classmethod
    def read(cls, f: Fields) -> JSON:
        own = super().read(f)
        layers = own["num_hidden_layers"]
        types = f.raw.get("mlp_layer_types")
        if types is None:
            dense = min(own["first_k_dense_replace"], layers)
            types = [DENSE] * dense + [SPARSE] * (layers - dense)
        # Published files name the multi-token-prediction layer's too.
        if not isinstance(types, list) or len(types) < layers or not set(types) <= {DENSE, SPARSE}:
            raise f.fail("mlp_layer_types", types, f'"{DENSE}" or "{SPARSE}" for each of {layers} layers')
        return own | {"mlp_layer_types": tuple(types[:layers])}

    def is_moe(self, layer: int) -> bool:
        return layer >= self.num_hidden_layers or self.mlp_layer_types[layer] == SPARSE
