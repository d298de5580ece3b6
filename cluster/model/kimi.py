"""Kimi K2's checkpoints, and K2.5's: DeepSeek-V3's architecture, in K2.5 as the text model of one that sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.model.config import Fields
from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config


@dataclass(frozen=True, kw_only=True)
class KimiK2Config(DeepseekV3Config):
    """`kimi_k2`: its configuration class is DeepSeek-V3's under another name."""

    label: ClassVar[str] = "Kimi K2"


@dataclass(frozen=True, kw_only=True)
class KimiK25Config(KimiK2Config):
    """`kimi_k25`, K2.5 and later: what the text model is stands in `text_config`, and its tensors have names of their
    own. The vision tower and its projector are not read."""

    label: ClassVar[str] = "Kimi K2.5"
    prefix: ClassVar[str] = "language_model."
    not_supported: ClassVar[tuple[str, ...]] = ("images and video: the vision tower and its projector are not read",)

    @classmethod
    def read(cls, f: Fields) -> JSON:
        text = f.raw.get("text_config")
        if not isinstance(text, dict):
            raise f.fail("text_config", text, "an object: the text model's config")
        inner = Fields(text, f"{f.where}: text_config")
        inner.exactly("model_type", ("kimi_k2", "deepseek_v3"), "deepseek_v3")
        # Published files say these in either place. In both, the outer one counts, as to transformers and vLLM.
        outer = {name: f.raw[name] for name in ("quantization_config", "eos_token_id", "torch_dtype", "dtype")
                 if f.raw.get(name) is not None}  # fmt: skip
        merged = Fields({**text, **outer, "model_type": f.raw["model_type"]}, inner.where)
        return super().read(merged)
