"""POST /v1/completions: its prompts, as text or as token ids, and its own fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from isotherm.cluster.api.bodies.common import MAX_N, MAX_TOP_LOGPROBS, GenerationBody, ListOf, NonEmpty, TokenId
from isotherm.cluster.api.bodies.other_routes import COMPLETIONS
from isotherm.cluster.api.bodies.structure import StructuredBody

MAX_PROMPTS = 128
MAX_CHOICES = 128  # prompts × n, or × best_of
_Tokens = Annotated[ListOf[TokenId], Field(min_length=1)]


def _shape(value: Any) -> str:
    """Which member of a union the value means to be, so that its errors are about that one."""
    if not isinstance(value, list):
        return "text"
    if value and isinstance(value[0], list):
        return "token lists"
    return "tokens" if value and not isinstance(value[0], str) else "texts"


class CompletionBody(StructuredBody, GenerationBody):
    """POST /v1/completions."""

    route = COMPLETIONS
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationBody.neutral,
        "suffix": ("",),
        # What a chat may ask for, and a client may believe that a completion does too.
        "top_logprobs": (0,),
        "chat_template_kwargs": ({},),
        "separate_reasoning": (False,),
        "reasoning": (),
        "thinking": (),
        "enable_thinking": (),
        "max_thinking_tokens": (),
        "include_reasoning": (),
        "reasoning_format": ("none",),  # a thought is part of the text
        "continue_final_message": (False,),
        "documents": ([],),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
    }

    prompt: Annotated[
        Annotated[NonEmpty, Tag("text")]
        | Annotated[ListOf[NonEmpty], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
        | Annotated[_Tokens, Tag("tokens")]
        | Annotated[ListOf[_Tokens], Field(min_length=1, max_length=MAX_PROMPTS), Tag("token lists")],
        Discriminator(_shape),
    ]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionBody:
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise PydanticCustomError("field:best_of", "best_of must be at least n, which is {n}", {"n": n})
        if self.stream and self.samples > n:
            raise PydanticCustomError(
                "field:best_of", "best_of must equal n in a stream: which are best shows at the end"
            )
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("field:max_tokens", "max_tokens must be at least 1, or echo true")
        if len(self.prompts) * self.samples > MAX_CHOICES:
            name = "n" if self.samples == n else "best_of"
            raise PydanticCustomError(
                f"field:{name}", "prompts × {name} must be at most {limit}", {"name": name, "limit": MAX_CHOICES}
            )
        return self

    @property
    def samples(self) -> int:
        return self.best_of or self.n or 1

    @property
    def prompt_logprob_count(self) -> int | None:
        asked = [count for count in (self.prompt_logprobs, self.logprobs if self.echo else None) if count is not None]
        return max(asked, default=None)

    @property
    def echoes_logprobs(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

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
