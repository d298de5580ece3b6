"""POST /v1/responses: OpenAI's items, and the route's own fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from isotherm.cluster.api.bodies.common import (
    MAX_MESSAGES,
    BodyModel,
    ListOf,
    NonEmpty,
    RefusalPart,
    UnshownPart,
    at_most,
    part_kind,
    part_or_unshown,
    text_or_list,
)
from isotherm.cluster.api.bodies.other_routes import RESPONSES
from isotherm.cluster.api.bodies.translated import TranslatedBody, by_word
from isotherm.cluster.jsontypes import JSON

_MAX_METADATA = 16


class ItemTextPart(BodyModel):
    """A part of a message's content, or of a call's output."""

    type: Literal["input_text", "output_text", "text"]
    text: str


_Part = Annotated[
    Annotated[ItemTextPart, Tag("text part")] | Annotated[RefusalPart, Tag("refusal part")], Discriminator(part_kind)
]
_Content = Annotated[Annotated[str, Tag("text")] | Annotated[ListOf[_Part], Tag("list")], Discriminator(text_or_list)]


class UnshownItemPart(UnshownPart):
    type: Literal["input_image", "input_file"]


_OutputPart = Annotated[
    Annotated[ItemTextPart, Tag("text part")]
    | Annotated[RefusalPart, Tag("refusal part")]
    | Annotated[UnshownItemPart, Tag("unshown part")],
    part_or_unshown(("input_image", "input_file")),
]
_Output = Annotated[
    Annotated[str, Tag("text")] | Annotated[ListOf[_OutputPart], Tag("list")], Discriminator(text_or_list)
]


class _Item(BodyModel):
    id: str | None = None  # what was given back had one; what a client writes itself mostly has none


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content


class CallItem(_Item):
    """A call that the model made, of a function that may be of a namespace."""

    type: Literal["function_call"]
    call_id: NonEmpty
    namespace: str | None = None
    name: NonEmpty
    arguments: str


class CallOutputItem(_Item):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: NonEmpty
    output: _Output


class ReasoningText(BodyModel):
    type: Literal["reasoning_text", "summary_text", "text"]
    text: str


class ReasoningItem(_Item):
    """A thought that the model had."""

    type: Literal["reasoning"]
    summary: ListOf[ReasoningText] = Field(default_factory=list)
    content: ListOf[ReasoningText] | None = None
    encrypted_content: str | None = None


class ItemReference(BodyModel):
    """An item of a response that is kept."""

    model_config = ConfigDict(json_schema_extra={"not": {"required": ["role"]}})  # without a type it would be a message

    type: Literal["item_reference"] | None = None
    id: NonEmpty


def _unsaid_type(item: JSON) -> str:
    """What is no message has nothing but an id."""
    return "item_reference" if "role" not in item and "id" in item else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message item")]
    | Annotated[CallItem, Tag("function_call item")]
    | Annotated[CallOutputItem, Tag("function_call_output item")]
    | Annotated[ReasoningItem, Tag("reasoning item")]
    | Annotated[ItemReference, Tag("item_reference item")],
    by_word(
        "type",
        ("message", "function_call", "function_call_output", "reasoning", "item_reference"),
        "item",
        _unsaid_type,
    ),
]


class FunctionTool(BodyModel):
    """A function of the client's."""

    type: Literal["function"]
    name: NonEmpty
    description: str | None = None
    parameters: JSON | None = None
    strict: bool | None = None


class FreeformTool(BodyModel):
    """One whose input is any text. In a namespace it is left out, as a hosted one is."""

    type: Literal["custom"]


_Member = Annotated[
    Annotated[FunctionTool, Tag("function tool")] | Annotated[FreeformTool, Tag("custom tool")],
    by_word("type", ("function", "custom"), "tool"),
]


class NamespaceTool(BodyModel):
    """Functions that have a name in common: those of an MCP server, or what an agent offers for one purpose."""

    type: Literal["namespace"]
    name: NonEmpty
    description: str | None = None
    tools: ListOf[_Member] | None = None

    @property
    def functions(self) -> list[tuple[int, FunctionTool]]:
        """Those that can be offered, with their places among all."""
        return [(i, tool) for i, tool in enumerate(self.tools or ()) if isinstance(tool, FunctionTool)]


@dataclass(frozen=True)
class OfferedFunction:
    """A function of a body's, wherever it stands. `param`: the name of its place in an error."""

    param: str
    tool: FunctionTool
    namespace: NamespaceTool | None = None


_HOSTED = (
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
    "file_search",
    "code_interpreter",
    "image_generation",
)


class HostedTool(BodyModel):
    """One that OpenAI runs, which agents offer unasked. It is not here, and the model is not told of it: what no model
    calls, nobody misses."""

    type: Literal[_HOSTED]  # type: ignore[valid-type]  # of a constant


class FunctionChoice(BodyModel):
    """A function by its name. Without its `namespace` it is one of none, or the only one of that name."""

    type: Literal["function"]
    namespace: str | None = None
    name: NonEmpty


class NamespaceChoice(BodyModel):
    """All functions of a namespace."""

    type: Literal["namespace"]
    name: NonEmpty


def _one_of(*others: str) -> Discriminator:
    return by_word("type", (*others, *_HOSTED), "tool", kinds=dict.fromkeys(_HOSTED, "hosted"))


_Allowed = Annotated[
    Annotated[FunctionChoice, Tag("function tool")]
    | Annotated[NamespaceChoice, Tag("namespace tool")]
    | Annotated[HostedTool, Tag("hosted tool")],
    _one_of("function", "namespace"),
]


class AllowedTools(BodyModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: ListOf[_Allowed] = Field(min_length=1)


_Tool = Annotated[
    Annotated[FunctionTool, Tag("function tool")]
    | Annotated[NamespaceTool, Tag("namespace tool")]
    | Annotated[HostedTool, Tag("hosted tool")],
    _one_of("function", "namespace"),
]


def _choice_kind(value: Any) -> str:
    if isinstance(value, dict):
        return "allowed tools" if value.get("type") == "allowed_tools" else "one function"
    return "a word"


_ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a word")]
    | Annotated[FunctionChoice, Tag("one function")]
    | Annotated[AllowedTools, Tag("allowed tools")],
    Discriminator(_choice_kind),
]


class TextFormat(BodyModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: JSON | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise PydanticCustomError("field:schema", "schema is required where type is json_schema")
        return self


class TextConfig(BodyModel):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(BodyModel):
    """`summary`, and its older name: a thought is never summarised; asked for, the summary is the thought itself, for
    clients that show no other."""

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class StreamOptions(BodyModel):
    include_obfuscation: Literal[False] | None = None


_Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]
# The last ones are of what is not here: of hosted tools, whose clients ask for this too, and of images.
_Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponsesBody(TranslatedBody):
    """POST /v1/responses."""

    route = RESPONSES
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **TranslatedBody.neutral,
        "background": (False,),
        "conversation": (),
        "context_management": ([],),
        "moderation": (),
        "truncation": ("disabled",),
    }

    model: NonEmpty
    input: Annotated[
        Annotated[NonEmpty, Tag("text")]
        | Annotated[ListOf[Item], Field(min_length=1, max_length=MAX_MESSAGES), Tag("list")],
        Discriminator(text_or_list),
    ]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: ListOf[_Tool] | None = None
    tool_choice: _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None  # of OpenAI's own tools, of which there are none
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: ListOf[_Included] | None = None
    metadata: Annotated[_Metadata | None, at_most(_MAX_METADATA)] = Field(None, max_length=_MAX_METADATA)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None  # the prefix cache finds by itself what prompts have in common

    @property
    def items(self) -> list[Item]:
        return [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    def input_param(self, index: int) -> str:
        """The name of one of `items` in an error."""
        return "input" if isinstance(self.input, str) else f"input[{index}]"

    @property
    def functions(self) -> list[OfferedFunction]:
        """The tools that there are, those of namespaces too, in the order in which they stand."""
        found: list[OfferedFunction] = []
        for i, tool in enumerate(self.tools or ()):
            if isinstance(tool, FunctionTool):
                found.append(OfferedFunction(f"tools[{i}]", tool))
            elif isinstance(tool, NamespaceTool):
                found += [OfferedFunction(f"tools[{i}].tools[{j}]", one, tool) for j, one in tool.functions]
        return found

    @property
    def is_kept(self) -> bool:
        return self.store is not False

    def includes(self, what: _Included) -> bool:
        return what in (self.include or ())
