"""OpenAI's request bodies and error form: what a client may send to /v1/completions and /v1/chat/completions, and which
field an error is about.

A field that nobody knows is ignored, as real clients send many. A known field that can't be honoured is refused by
name, unless it has its neutral value. Knows nothing about tokenizers, engines or the web framework."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from isotherm.cluster.jsontypes import JSON

MAX_PROMPTS = 128
MAX_CHOICES = 128  # prompts × n
MAX_N = 8
_MAX_STOPS = 16
_MAX_STOP_CHARS = 1000
_MAX_TOP_LOGPROBS = 20
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


def _shape(value: Any) -> str:
    """Which member of a union the value means to be, so that its errors are about that one."""
    if not isinstance(value, list):
        return "text"
    if value and isinstance(value[0], list):
        return "token lists"
    return "tokens" if value and not isinstance(value[0], str) else "texts"


def _text_or_list(value: Any) -> str:
    return "list" if isinstance(value, list) else "text"


_NonEmpty = Annotated[str, Field(min_length=1)]
_Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]
_TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
_TokenKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]  # a token id as a key of JSON
_Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
_Tokens = Annotated[list[_TokenId], Field(min_length=1)]
_Stops = Annotated[
    Annotated[_Stop, Tag("text")] | Annotated[list[_Stop], Field(max_length=_MAX_STOPS), Tag("list")],
    Discriminator(_text_or_list),
]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TextPart(_Model):
    type: Literal["text"]
    text: str


_Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Field(min_length=1), Tag("list")],
    Discriminator(_text_or_list),
]


class StreamOptions(_Model):
    include_usage: bool = False


class Message(_Model):
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


def _hint(neutral: tuple[Any, ...]) -> str:
    allowed = " or ".join(json.dumps(value) for value in neutral)
    return f"; leave it out or give {allowed}" if allowed else "; leave it out"


class GenerationBody(_Model):
    """What both kinds of request share, with extensions that other servers know too. A field of the name that one of
    SamplingParams has goes to the engine as it is."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "response_format": ({"type": "text"},),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "structured_outputs": (),
        "prompt_logprobs": (0, False),
        "include_stop_str_in_output": (False,),
    }

    model: _NonEmpty
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: _Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)  # 0 and -1: off
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=2, allow_inf_nan=False)
    logit_bias: dict[_TokenKey, _Bias] | None = Field(None, max_length=1024)
    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)  # lower ones have their turn first
    user: str | None = Field(None, max_length=512)  # whom it is for: requests are shared out over users
    stop_token_ids: list[_TokenId] | None = Field(None, max_length=128)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, neutral in cls.neutral.items():
                value = data.get(name)
                if value is not None and not any(
                    value == allowed and isinstance(value, bool) <= isinstance(allowed, bool) for allowed in neutral
                ):
                    raise PydanticCustomError(
                        f"field:{name}", "{name} is not supported yet{hint}", {"name": name, "hint": _hint(neutral)}
                    )
        return data

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("field:stream_options", "stream_options is only allowed when stream is true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


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
    }

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MAX_TOP_LOGPROBS)
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


class CompletionBody(GenerationBody):
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
        "tools": ([],),
        "tool_choice": ("none", "auto"),
    }

    prompt: Annotated[
        Annotated[_NonEmpty, Tag("text")]
        | Annotated[list[_NonEmpty], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
        | Annotated[_Tokens, Tag("tokens")]
        | Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_PROMPTS), Tag("token lists")],
        Discriminator(_shape),
    ]
    logprobs: int | None = Field(None, ge=0, le=_MAX_TOP_LOGPROBS)
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
