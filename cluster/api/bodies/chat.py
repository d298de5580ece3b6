"""POST /v1/chat/completions: its own fields."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from isotherm.cluster.api.bodies.chat_message import Message
from isotherm.cluster.api.bodies.common import (
    MAX_DOCUMENTS,
    MAX_MESSAGES,
    MAX_TOP_LOGPROBS,
    GenerationBody,
    ListOf,
)
from isotherm.cluster.api.bodies.other_routes import CHAT
from isotherm.cluster.api.bodies.structure import StructuredBody
from isotherm.cluster.api.bodies.thinking import ThinkingBody
from isotherm.cluster.api.bodies.tools import ToolsBody
from isotherm.cluster.jsontypes import JSON

_RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
        "self",
    }
)


class ChatBody(ToolsBody, StructuredBody, ThinkingBody):
    """POST /v1/chat/completions."""

    route = CHAT
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationBody.neutral,
        "echo": (False,),
        "best_of": (1,),
        "add_special_tokens": (False,),  # templates write their own
    }

    messages: ListOf[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    documents: ListOf[JSON] | None = Field(None, max_length=MAX_DOCUMENTS)
    chat_template: str | None = None  # the name of one of the model's own
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if (
            self.max_tokens is not None
            and self.max_completion_tokens is not None
            and self.max_tokens != self.max_completion_tokens
        ):
            raise PydanticCustomError(
                "field:max_tokens", "max_tokens and max_completion_tokens differ; give one of them"
            )
        if self.hides_thought and (self.logprobs or self.return_token_ids):
            field = "logprobs" if self.logprobs else "return_token_ids"
            raise PydanticCustomError(
                f"field:{field}", "{field} would tell the thought, which is to be left out", {"field": field}
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("field:top_logprobs", "top_logprobs needs logprobs to be true")
        if reserved := _RESERVED_TEMPLATE_KWARGS & (self.chat_template_kwargs or {}).keys():
            raise PydanticCustomError(
                "field:chat_template_kwargs", "chat_template_kwargs must not set {name}", {"name": min(reserved)}
            )
        self._check_end()
        return self

    def _check_end(self) -> None:
        for i, message in enumerate(self.messages[:-1]):
            if message.prefix:
                raise PydanticCustomError(f"field:messages[{i}].prefix", "only the last message can go on")
        if self.messages[-1].prefix and self.continue_final_message is False:
            raise PydanticCustomError(
                "field:continue_final_message", "continue_final_message is false while the last message is a prefix"
            )
        if self.goes_on and self.add_generation_prompt:
            raise PydanticCustomError(
                "field:add_generation_prompt",
                "add_generation_prompt begins a new message, while the last one is to go on; give one of them",
            )

    @property
    def goes_on(self) -> bool:
        """Whether the reply goes on with the last message."""
        return bool(self.messages[-1].prefix or self.continue_final_message)

    @property
    def output_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """As SamplingParams.logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None
