"""One message of a chat, as OpenAI's clients and those that speak like them write it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from isotherm.cluster.api.bodies.common import (
    BodyModel,
    ListOf,
    RefusalPart,
    UnshownPart,
    part_or_unshown,
    text_or_list,
)
from isotherm.cluster.jsontypes import JSON


class TextPart(BodyModel):
    type: Literal["text"]
    text: str


class UnshownChatPart(UnshownPart):
    type: Literal["image_url", "file", "input_audio", "video_url"]


_Part = Annotated[
    Annotated[TextPart, Tag("text part")]
    | Annotated[RefusalPart, Tag("refusal part")]
    | Annotated[UnshownChatPart, Tag("unshown part")],
    part_or_unshown(("image_url", "file", "input_audio", "video_url")),
]
_Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[ListOf[_Part], Field(min_length=1), Tag("list")],
    Discriminator(text_or_list),
]


class Message(BodyModel):
    """`content` is null only where an assistant called tools, thought or refused. `prefix`: the reply goes on with this
    message, which is the last one and the assistant's."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Content | None = None
    name: str | None = None
    tool_calls: ListOf[JSON] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    prefix: bool | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # replies have both, and clients send back either

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        assistants = bool(self.tool_calls) or self._thought is not None or self.refusal is not None
        if self.content is None and not (self.role == "assistant" and assistants):
            text = "a message of role {role} needs content: a string or a list of text parts"
            raise PydanticCustomError("field:content", text, {"role": self.role})
        if self.role != "assistant" and self.prefix:
            raise PydanticCustomError("field:prefix", "prefix is for a message of the assistant")
        for i, part in enumerate(self.content if isinstance(self.content, list) else ()):
            if isinstance(part, RefusalPart) and self.role != "assistant":
                raise PydanticCustomError(
                    "field:content", "content[{i}] is a refusal, which only the assistant has", {"i": i}
                )
            if isinstance(part, UnshownPart) and self.role != "tool":
                text = (
                    "type must be text: the model reads nothing else; {type} is passed over in a tool's message alone"
                )
                raise PydanticCustomError(f"field:content[{i}].type", text, {"type": part.type})
        return self

    @property
    def _thought(self) -> str | None:
        return self.reasoning if self.reasoning_content is None else self.reasoning_content

    @property
    def _said(self) -> str | None:
        if self.content is None:
            return self.refusal
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)

    @property
    def chars(self) -> int:
        """Of its text: a prompt has at least so many."""
        return len(self._said or "")

    def for_template(self) -> JSON:
        """The message as `Tokenizer.encode_chat` takes it: parts on lines of their own, `developer` under its older
        name, absent fields absent."""
        others = self.model_dump(include={"name", "tool_calls", "tool_call_id", "prefix"}, exclude_none=True)
        if self._thought is not None:
            others["reasoning_content"] = self._thought
        return {"role": "system" if self.role == "developer" else self.role, "content": self._said, **others}
