"""Anthropic's POST /v1/messages and /v1/messages/count_tokens: messages made of blocks, and the routes' own fields."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from isotherm.cluster.api.bodies.common import (
    MAX_MESSAGES,
    BodyModel,
    ListOf,
    NonEmpty,
    UnshownPart,
    text_or_list,
)
from isotherm.cluster.api.bodies.other_routes import MESSAGES
from isotherm.cluster.api.bodies.translated import TranslatedBody, by_word
from isotherm.cluster.jsontypes import JSON


class TextBlock(BodyModel):
    type: Literal["text"]
    text: str


_Texts = Annotated[Annotated[str, Tag("text")] | Annotated[ListOf[TextBlock], Tag("list")], Discriminator(text_or_list)]


class ThinkingBlock(BodyModel):
    """A thought that the model had. Its signature says nothing here: thoughts are given in the open."""

    type: Literal["thinking"]
    thinking: str


class ToolUseBlock(BodyModel):
    type: Literal["tool_use"]
    id: NonEmpty
    name: NonEmpty
    input: JSON


class UnshownBlock(UnshownPart):
    type: Literal["image", "document"]


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text block")] | Annotated[UnshownBlock, Tag("unshown block")],
    by_word("type", ("text", "image", "document"), "block", kinds={"image": "unshown", "document": "unshown"}),
]


class ToolResultBlock(BodyModel):
    type: Literal["tool_result"]
    tool_use_id: NonEmpty
    content: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[ListOf[ResultBlock], Tag("list")], Discriminator(text_or_list)
        ]
        | None
    ) = None
    is_error: bool | None = None


UserBlock = Annotated[
    Annotated[TextBlock, Tag("text block")] | Annotated[ToolResultBlock, Tag("tool_result block")],
    by_word("type", ("text", "tool_result"), "block"),
]
AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("text block")]
    | Annotated[ThinkingBlock, Tag("thinking block")]
    | Annotated[ToolUseBlock, Tag("tool_use block")],
    by_word("type", ("text", "thinking", "tool_use"), "block"),
]


class UserMessage(BodyModel):
    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[ListOf[UserBlock], Field(min_length=1), Tag("list")],
        Discriminator(text_or_list),
    ]

    @property
    def blocks(self) -> list[UserBlock]:
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @property
    def has_results(self) -> bool:
        return any(isinstance(block, ToolResultBlock) for block in self.blocks)


class AssistantMessage(BodyModel):
    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[ListOf[AssistantBlock], Tag("list")], Discriminator(text_or_list)
    ]

    @property
    def blocks(self) -> list[AssistantBlock]:
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class SystemMessage(BodyModel):
    """An instruction in the middle of a chat."""

    role: Literal["system"]
    content: _Texts


MessageParam = Annotated[
    Annotated[UserMessage, Tag("user message")]
    | Annotated[AssistantMessage, Tag("assistant message")]
    | Annotated[SystemMessage, Tag("system message")],
    by_word("role", ("user", "assistant", "system"), "message"),
]


class CustomTool(BodyModel):
    """A tool of the client's. Anthropic's own (web search, bash, text editor, …) are of other types, and not there."""

    type: Literal["custom"] | None = None
    name: NonEmpty
    description: str | None = None
    input_schema: JSON
    strict: bool | None = None
    input_examples: ListOf[JSON] | None = None
    allowed_callers: ListOf[Literal["direct"]] | None = None
    defer_loading: Literal[False] | None = None

    @property
    def parameters(self) -> JSON:
        """Of its input, examples included where a schema has them."""
        return self.input_schema if not self.input_examples else {**self.input_schema, "examples": self.input_examples}


class ToolChoice(BodyModel):
    type: Literal["auto", "any", "tool", "none"]
    name: NonEmpty | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_its_tool(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("field:name", 'name goes with type "tool", and only with it')
        return self


class Thinking(BodyModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None  # a thought that is shown is never summarised

    @model_validator(mode="after")
    def _has_a_budget(self) -> Thinking:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise PydanticCustomError("field:budget_tokens", 'budget_tokens goes with type "enabled", and only with it')
        return self


class OutputFormat(BodyModel):
    type: Literal["json_schema"]
    schema_: JSON = Field(alias="schema")


class OutputConfig(BodyModel):
    effort: str | None = None
    format: OutputFormat | None = None


class AllTurns(BodyModel):
    type: Literal["all"]


class LastTurns(BodyModel):
    type: Literal["thinking_turns"]
    value: int = Field(ge=1)


def _keep_kind(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "a word"
    kinds = {"all": "all turns", "thinking_turns": "last turns"}
    return kinds.get(kind) if isinstance(kind := value.get("type"), str) else None


_Keep = Annotated[
    Annotated[Literal["all"], Tag("a word")]
    | Annotated[AllTurns, Tag("all turns")]
    | Annotated[LastTurns, Tag("last turns")],
    Discriminator(
        _keep_kind,
        custom_error_type="field:type",
        custom_error_message="must be all or thinking_turns; others are not taken",
    ),
]


class ClearThinking(BodyModel):
    """Thoughts of the assistant's turns before those to `keep` are not told to the model. Anthropic's other edits, of
    tool results and whole conversations, are not there."""

    type: Literal["clear_thinking_20251015"]
    keep: _Keep = LastTurns(type="thinking_turns", value=1)

    @property
    def turns(self) -> int | None:
        """How many of the last ones keep theirs; None: all."""
        return self.keep.value if isinstance(self.keep, LastTurns) else None


class ContextManagement(BodyModel):
    edits: ListOf[ClearThinking] = Field(default_factory=list)


class Metadata(BodyModel):
    user_id: str | None = None


class Conversation(TranslatedBody):
    """What both routes take: all that the prompt depends on. Anthropic's `cache_control` is taken wherever it stands,
    and says nothing here: what prompts have in common is found without."""

    route = MESSAGES
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **TranslatedBody.neutral,
        "container": (),
        "diagnostics": ({},),
        "thread": (),
        "compaction": (),
        "fallbacks": ([],),
        "inference_geo": (),
        "mcp_servers": ([],),
        "speed": ("standard",),
        "stream_options": (),
    }

    model: NonEmpty
    messages: ListOf[MessageParam] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: _Texts | None = None
    tools: ListOf[CustomTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    context_management: ContextManagement | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its older place

    @property
    def thinking_turns(self) -> int | None:
        """How many of the assistant's last turns keep their thoughts; None: all."""
        edits = [] if self.context_management is None else self.context_management.edits
        return min((edit.turns for edit in edits if edit.turns is not None), default=None)


class MessagesBody(Conversation):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1, le=2**31 - 1)
    stop_sequences: ListOf[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _thinks_within_its_tokens(self) -> MessagesBody:
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            raise PydanticCustomError(
                "field:thinking.budget_tokens",
                "budget_tokens must be less than max_tokens, and {budget} is not less than {limit}",
                {"budget": budget, "limit": self.max_tokens},
            )
        return self
