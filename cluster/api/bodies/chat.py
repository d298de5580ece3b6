"""POST /v1/chat/completions: its messages and its own fields."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from isotherm.cluster.api.bodies.common import MAX_TOP_LOGPROBS, BodyModel, GenerationBody, text_or_list
from isotherm.cluster.jsontypes import JSON

_RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "self",
    }
)


class TextPart(BodyModel):
    type: Literal["text"]
    text: str


_Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Field(min_length=1), Tag("list")],
    Discriminator(text_or_list),
]


class Message(BodyModel):
    """One message of a chat. `content` is null only where the assistant called tools."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Content | None = None
    name: str | None = None
    tool_calls: list[JSON] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # replies have both, and clients send back either

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self._thought is not None)):
            raise PydanticCustomError(
                "field:content", "a {role} message needs content: a string or a list of text parts", {"role": self.role}
            )
        return self

    @property
    def _thought(self) -> str | None:
        return self.reasoning if self.reasoning_content is None else self.reasoning_content

    def for_template(self) -> JSON:
        """The message as chat templates expect it: text parts joined as they are, `developer` under its older name,
        absent fields absent. A null content stays, since DeepSeek's templates test it."""
        content = (
            self.content
            if self.content is None or isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )
        others = self.model_dump(include={"name", "tool_calls", "tool_call_id"}, exclude_none=True)
        if self._thought is not None:
            others["reasoning_content"] = self._thought
        return {"role": "system" if self.role == "developer" else self.role, "content": content, **others}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationBody.neutral,
        "tool_choice": ("auto", "none"),
        "parallel_tool_calls": (True,),
        "functions": ([],),
        "function_call": ("auto", "none"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "reasoning_effort": (),
        "verbosity": (),
        "echo": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "documents": ([],),
        "best_of": (1,),
        "add_special_tokens": (False,),  # templates write their own
    }

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[JSON] | None = None
    tool_choice: str | None = None
    chat_template: Any = None
    chat_template_kwargs: JSON | None = None
    separate_reasoning: bool | None = None  # false: the thought stays in content, as the model wrote it

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.chat_template is not None:
            raise PydanticCustomError(
                "field:chat_template", "chat_template is refused: only the model's own template is used"
            )
        if self.tools and self.tool_choice != "none":
            # Calls would come back as raw text. Those of earlier turns, in `messages`, are the template's business.
            raise PydanticCustomError(
                "field:tools", 'tools are not served yet: leave them out, or give tool_choice "none"'
            )
        if (
            self.max_tokens is not None
            and self.max_completion_tokens is not None
            and self.max_tokens != self.max_completion_tokens
        ):
            raise PydanticCustomError(
                "field:max_tokens", "max_tokens and max_completion_tokens differ; give one of them"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("field:top_logprobs", "top_logprobs needs logprobs to be true")
        if reserved := _RESERVED_TEMPLATE_KWARGS & (self.chat_template_kwargs or {}).keys():
            raise PydanticCustomError(
                "field:chat_template_kwargs", "chat_template_kwargs must not set {name}", {"name": min(reserved)}
            )
        return self

    @property
    def output_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """As SamplingParams.logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None
