"""POST /tokenize and /detokenize, with vLLM's bodies."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.common import BodyModel, ListOf, NonEmpty, RequestBody, TokenId
from isotherm.cluster.api.bodies.completion import CompletionBody
from isotherm.cluster.api.bodies.other_routes import COMPLETIONS


class TokenizeTextBody(RequestBody):
    """A text, as a completion's prompt is taken. What shapes a chat's prompt shapes none here."""

    route = COMPLETIONS
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        name: CompletionBody.neutral[name]
        for name in ("tools", "documents", "chat_template_kwargs", "continue_final_message", "input_ids")
    }

    model: NonEmpty | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChatBody(ChatBody):
    """A chat with everything that one may ask for, as /v1/chat/completions takes it."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {**ChatBody.neutral, "add_special_tokens": (False,)}

    return_token_strs: bool | None = None


class DetokenizeBody(BodyModel):
    model: NonEmpty | None = None
    tokens: ListOf[TokenId] = Field(max_length=1 << 20)
