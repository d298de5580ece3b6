"""A `joyai_llm_flash` checkpoint (JoyAI-LLM-Flash): DeepSeek-V3's architecture and names, smaller, with a
multi-token-prediction layer that has no experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config


@dataclass(frozen=True, kw_only=True)
class JoyAiLlmFlashConfig(DeepseekV3Config):
    label: ClassVar[str] = "JoyAI-LLM-Flash"

    def is_moe(self, layer: int) -> bool:
        """The MTP layers, from num_hidden_layers on, are dense (arXiv:2604.03044, §2.1)."""
        return layer < self.num_hidden_layers and super().is_moe(layer)
