"""What every body that asks for tokens shares: types of fields, sampling parameters, and how a known field that cannot
be honoured is refused.

A field that nobody knows is ignored, as real clients send many. A known field that can't be honoured is refused by
name, unless it has its neutral value. Knows nothing about tokenizers, engines or the web framework."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from isotherm.cluster.api.bodies.other_names import OTHER_NAMES
from isotherm.cluster.api.bodies.other_routes import fields_of_other_routes
from isotherm.cluster.api.bodies.unserved import HARMLESS, UNSERVED

MAX_N = 128
MAX_TOP_LOGPROBS = 20
_MAX_STOPS = 16
_MAX_STOP_CHARS = 1000
_MAX_BAD_WORDS = 128
_MAX_BIASES = 1024
MAX_MESSAGES = 32_768  # of a chat, or items of a response
MAX_DOCUMENTS = 1024


def text_or_list(value: Any) -> str:
    return "list" if isinstance(value, list) else "text"


def at_most(count: int) -> BeforeValidator:
    """Of an object with more entries than there may be, none is looked at: each that is wrong would be an error of its
    own, and only the first one is told."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            text = "Expected at most {most} entries"
            raise PydanticCustomError("too_long", text, {"most": count})
        return value

    return BeforeValidator(check)


_T = TypeVar("_T")
# Of a list, which may be long, the first wrong element is all that anyone is told.
ListOf = Annotated[list[_T], Field(fail_fast=True)]
NonEmpty = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]
# False is what some clients send for none.
_Count = Annotated[int | None, BeforeValidator(lambda value: None if value is False else value)]
_TokenKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]  # a token id as a key of JSON
_Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
_Stops = Annotated[
    Annotated[_Stop, Tag("text")] | Annotated[ListOf[_Stop], Field(max_length=_MAX_STOPS), Tag("list")],
    Discriminator(text_or_list),
]


class BodyModel(BaseModel):
    """Any object in a body: no coercion, unknown fields left out."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class RefusalPart(BodyModel):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class UnshownPart(BodyModel):
    """What a tool gave that is no text. The model is told that it was there: agents send a conversation whole each
    time, and one with a result that is refused could never go on."""

    type: str

    @property
    def text(self) -> str:
        return f"[{_UNSHOWN[self.type]} not shown: this model reads text only]"


_UNSHOWN = {  # by the types that the three routes give them
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "document": "document",
    "file": "file",
    "input_file": "file",
    "input_audio": "sound",
    "video_url": "video",
}


def part_kind(value: Any) -> str:
    """A tag that is no key of a part. What is of neither type is taken for text, and its type is what is wrong."""
    return "refusal part" if isinstance(value, dict) and value.get("type") == "refusal" else "text part"


def part_or_unshown(types: Sequence[str]) -> Discriminator:
    """As `part_kind`, where parts of these types are taken and not shown."""

    def kind(value: Any) -> str:
        return "unshown part" if isinstance(value, dict) and value.get("type") in types else part_kind(value)

    return Discriminator(kind)


class StreamOptions(BodyModel):
    include_usage: bool = False  # a last chunk with the usage
    continuous_usage_stats: bool = False  # the usage so far in each chunk
    include_timings: bool = False  # a last chunk with `timings`
    include_obfuscation: Literal[False] | None = None  # chunks are not padded


def _refusal(name: str, neutral: tuple[Any, ...]) -> str:
    instead = OTHER_NAMES[name][1] if name in OTHER_NAMES else ""
    allowed = " or ".join(json.dumps(value) for value in neutral)
    what = f"use {instead}, or leave it out" if instead else "leave it out"
    known = "here" if name in OTHER_NAMES else "yet"
    return f"{name} is not supported {known}; {what}{f' or give {allowed}' if allowed else ''}"


class RequestBody(BodyModel):
    """A whole body. `neutral`: the known fields that cannot be honoured, each with the values that ask for nothing.
    `route`: the one that it is for, where other routes have fields that it has not; those are `renamed`, each with what
    to do instead."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    route: ClassVar[str] = ""
    renamed: ClassVar[dict[str, str]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.renamed = fields_of_other_routes(cls.route)

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_routes_fields(cls, data: Any) -> Any:
        if isinstance(data, dict) and not cls.renamed.keys().isdisjoint(data):
            for name, instead in cls.renamed.items():
                if data.get(name) is not None:
                    refusal = f"{name} is no field of this route{instead and f'; {instead}'}"
                    raise PydanticCustomError(f"field:{name}", "{refusal}", {"refusal": refusal})
        return data

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict) and not cls.neutral.keys().isdisjoint(data):
            for name, neutral in cls.neutral.items():
                value = data.get(name)
                if value is not None and not any(
                    value == allowed and isinstance(value, bool) <= isinstance(allowed, bool) for allowed in neutral
                ):
                    raise PydanticCustomError(f"field:{name}", "{refusal}", {"refusal": _refusal(name, neutral)})
        return data


class GenerationBody(RequestBody):
    """What both kinds of request share, with extensions that other servers know too. A field of the name that one of
    SamplingParams has goes to the engine as it is."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "guided_whitespace_pattern": (),
        **{name: neutral for name, (neutral, _) in OTHER_NAMES.items()},
    }

    harmless: ClassVar[dict[str, str]] = HARMLESS

    model: NonEmpty
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
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
    repetition_penalty: float | None = Field(None, ge=1e-6, le=2, allow_inf_nan=False)
    logit_bias: Annotated[dict[_TokenKey, _Bias] | None, at_most(_MAX_BIASES)] = Field(None, max_length=_MAX_BIASES)
    min_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)  # lower ones have their turn first
    timeout: float | None = Field(None, gt=0, le=86400, allow_inf_nan=False)  # seconds from its arrival to its end
    user: str | None = Field(None, max_length=512)  # whom it is for; nothing follows from it
    stop_token_ids: ListOf[TokenId] | None = Field(None, max_length=128)
    ignore_eos: bool | None = None
    speculation: Literal["auto", "off"] | None = None  # off: its tokens are not guessed before they are computed
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: ListOf[_Stop] | None = Field(None, max_length=_MAX_BAD_WORDS)
    prompt_logprobs: _Count = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    return_token_ids: bool | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("field:stream_options", "stream_options is only allowed when stream is true")
        return self

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """A body refuses of other servers' fields those that it does not have."""
        super().__pydantic_init_subclass__(**kwargs)
        refused = {**UNSERVED, **cls.neutral}
        served = cls.model_fields.keys() & UNSERVED.keys()
        cls.neutral = {name: values for name, values in refused.items() if name not in served}

    @model_validator(mode="after")
    def _prompt_logprobs_come_whole(self) -> GenerationBody:
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError("field:prompt_logprobs", "prompt_logprobs has no form in a stream")
        return self

    @property
    def samples(self) -> int:
        """Choices of each prompt that are computed."""
        return self.n or 1

    @property
    def prompt_logprob_count(self) -> int | None:
        """As SamplingParams.prompt_logprobs."""
        return self.prompt_logprobs

    @property
    def echoes_logprobs(self) -> bool:
        """The prompt's log-probabilities are to stand before the output's."""
        return False

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def include_timings(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_timings
