"""How a chat asks for a thought, or for none: in the words of OpenAI, DeepSeek, Anthropic, Qwen, OpenRouter, vLLM."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from isotherm.cluster.api.bodies.common import BodyModel, GenerationBody
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.template_traits import THINKING_SWITCHES

_Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ThinkingOptions(BodyModel):
    """`thinking` as an object."""

    type: Literal["enabled", "disabled", "adaptive"] | None = None
    budget_tokens: int | None = Field(None, ge=0, le=2**31 - 1)


_Thinking = Annotated[
    Annotated[bool, Tag("switch")] | Annotated[ThinkingOptions, Tag("options")],
    Discriminator(lambda value: "options" if isinstance(value, dict | ThinkingOptions) else "switch"),
]


class ReasoningOptions(BodyModel):
    """`reasoning`."""

    effort: _Effort | None = None
    enabled: bool | None = None
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    exclude: bool | None = None


class ThinkingBody(GenerationBody):
    """The fields of a chat that are about its thought. What they ask for must agree; only `chat_template_kwargs` has
    the last word, since it goes to the template as it is."""

    reasoning_effort: _Effort | None = None
    thinking: _Thinking | None = None
    enable_thinking: bool | None = None
    reasoning: ReasoningOptions | None = None
    max_thinking_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    thinking_budget: int | None = Field(None, ge=0, le=2**31 - 1)
    include_reasoning: bool | None = None  # false: the thought is left out of the reply
    separate_reasoning: bool | None = None  # false: the thought stays in content, as the model wrote it
    chat_template_kwargs: JSON | None = None

    @model_validator(mode="after")
    def _thinking_agrees(self) -> ThinkingBody:
        for what, asked in (("thinking", self.thinking_asked), ("the length of the thought", self._lengths)):
            for (one, first), (other, second) in zip(asked.items(), list(asked.items())[1:], strict=False):
                if first != second:
                    raise PydanticCustomError(
                        f"field:{other}",
                        "{other} and {one} ask for different things of {what}; give one of them",
                        {"one": one, "other": other, "what": what},
                    )
        if self.hides_thought and self.separate_reasoning is False:
            raise PydanticCustomError(
                "field:separate_reasoning",
                "separate_reasoning false leaves the thought in content, where it cannot be left out",
            )
        return self

    @property
    def thinking_asked(self) -> dict[str, bool]:
        """The fields that turn thinking on or off, and which they do. A thought of at most 0 tokens is none."""
        thinking, reasoning = self.thinking, self.reasoning
        asked: dict[str, bool] = {}
        if self.effort is not None:
            asked["reasoning.effort" if self.reasoning_effort is None else "reasoning_effort"] = self.effort != "none"
        if isinstance(thinking, bool):
            asked["thinking"] = thinking
        elif thinking is not None and thinking.type is not None:
            asked["thinking"] = thinking.type != "disabled"
        if self.enable_thinking is not None:
            asked["enable_thinking"] = self.enable_thinking
        if reasoning is not None and reasoning.enabled is not None:
            asked["reasoning.enabled"] = reasoning.enabled
        asked.update({name: False for name, length in self._lengths.items() if length == 0})
        return asked

    @property
    def leaves_thought_to_model(self) -> bool:
        """Whether a thought is offered rather than asked for."""
        return isinstance(self.thinking, ThinkingOptions) and self.thinking.type == "adaptive"

    @property
    def effort(self) -> str | None:
        """One of `_Effort`."""
        inner = None if self.reasoning is None else self.reasoning.effort
        return inner if self.reasoning_effort is None else self.reasoning_effort

    @property
    def thought_limit(self) -> int | None:
        """How many tokens a thought may have."""
        return next(iter(self._lengths.values()), None)

    @property
    def hides_thought(self) -> bool:
        excluded = self.reasoning is not None and self.reasoning.exclude is True
        return excluded or self.include_reasoning is False

    @property
    def template_switches(self) -> dict[str, bool]:
        """Those of the template's own switches that `chat_template_kwargs` sets."""
        given = self.chat_template_kwargs or {}
        return {name: value for name in THINKING_SWITCHES if isinstance(value := given.get(name), bool)}

    @property
    def _lengths(self) -> dict[str, int]:
        lengths = {
            "max_thinking_tokens": self.max_thinking_tokens,
            "thinking_budget": self.thinking_budget,
            "thinking.budget_tokens": self.thinking.budget_tokens
            if isinstance(self.thinking, ThinkingOptions)
            else None,
            "reasoning.max_tokens": None if self.reasoning is None else self.reasoning.max_tokens,
        }
        return {name: length for name, length in lengths.items() if length is not None}
