"""A `joyai_llm_flash` checkpoint (JoyAI-LLM-Flash): DeepSeek-V3's architecture and names, smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config


@dataclass(frozen=True, kw_only=True)
class JoyAiLlmFlashConfig(DeepseekV3Config):
    label: ClassVar[str] = "JoyAI-LLM-Flash"
