"""The formats of tool calls by name, and which of them a model's chat template shows."""

from __future__ import annotations

from collections.abc import Mapping

from isotherm.cluster.text.tool_formats.base import ToolFormat
from isotherm.cluster.text.tool_formats.deepseek import DeepseekV3, DeepseekV31
from isotherm.cluster.text.tool_formats.dsml import DeepseekV32
from isotherm.cluster.text.tool_formats.glm import Glm4
from isotherm.cluster.text.tool_formats.hermes import Hermes
from isotherm.cluster.text.tool_formats.kimi import KimiK2
from isotherm.cluster.text.tool_formats.qwen3_coder import Qwen3Coder

# In the order in which templates are asked: GLM's and Qwen3-Coder's tags are Hermes' and more.
TOOL_FORMATS: Mapping[str, ToolFormat] = {
    known.name: known
    for known in (DeepseekV32(), KimiK2(), DeepseekV3(), DeepseekV31(), Glm4(), Qwen3Coder(), Hermes())
}


CHOICES = ("auto", *TOOL_FORMATS, "none")


def chosen_format(choice: str, template: str) -> ToolFormat | None:
    """The format by one of CHOICES, where `auto` is the one that the chat template shows."""
    return shown_format(template) if choice == "auto" else TOOL_FORMATS.get(choice)


def shown_format(template: str) -> ToolFormat | None:
    """The format that a chat template of this text shows; None where it shows none that is known."""
    return next((known for known in TOOL_FORMATS.values() if known.shown_by(template)), None)
