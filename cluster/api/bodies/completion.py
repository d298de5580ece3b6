"""POST /v1/completions: its prompts, as text or as token ids, and its own fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from isotherm.cluster.api.bodies.common import MAX_TOP_LOGPROBS, GenerationBody, NonEmpty, TokenId
from isotherm.cluster.api.bodies.structure import StructuredBody

MAX_PROMPTS = 128
MAX_CHOICES = 128  # prompts × n
_Tokens = Annotated[list[TokenId], Field(min_length=1)]


def _shape(value: Any) -> str:
    """Which member of a union the value means to be, so that its errors are about that one."""
    if not isinstance(value, list):
        return "text"
    if value and isinstance(value[0], list):
        return "token lists"
    return "tokens" if value and not isinstance(value[0], str) else "texts"


class CompletionBody(StructuredBody, GenerationBody):
    """POST /v1/completions."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationBody.neutral,
        "suffix": ("",),
        # What a chat may ask for, and a client may believe that a completion does too.
        "max_completion_tokens": (),
        "top_logprobs": (0,),
        "chat_template_kwargs": ({},),
        "separate_reasoning": (False,),
        "reasoning_effort": (),
        "reasoning": (),
        "thinking": (),
        "enable_thinking": (),
        "max_thinking_tokens": (),
        "include_reasoning": (),
        "continue_final_message": (False,),
        "documents": ([],),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
    }

    prompt: Annotated[
        Annotated[NonEmpty, Tag("text")]
        | Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
        | Annotated[_Tokens, Tag("tokens")]
        | Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_PROMPTS), Tag("token lists")],
        Discriminator(_shape),
    ]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise PydanticCustomError("field:best_of", "best_of must equal n: choosing among more is not supported yet")
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError("field:echo", "echo together with logprobs is not supported yet")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise PydanticCustomError("field:n", "prompts × n must be at most {limit}", {"limit": MAX_CHOICES})
        return self

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    def prompt_param(self, index: int) -> str:
        """The name of one of `prompts` in an error."""
        return f"prompt[{index}]" if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else "prompt"

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """As SamplingParams.logprobs."""
        return self.logprobs
