"""The fields by which a chat offers tools and says what is to be called."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PrivateAttr, StringConstraints, Tag, model_validator
from pydantic_core import PydanticCustomError

from isotherm.cluster.api.bodies.common import BodyModel, ListOf
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.tool_formats.base import Tool

_MAX_TOOLS = 512
_NO_PARAMETERS: JSON = {"type": "object", "properties": {}}
_FOR_TEMPLATES = ("name", "description", "parameters")
# Dots too: Kimi's clients and those of MCP have them. No format has one of these in its marks.
_Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
_OLDER = {"functions": "tools", "function_call": "tool_choice"}


class ToolFunction(BodyModel):
    name: _Name
    description: str | None = None
    parameters: JSON | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _parameters_are_of_an_object(self) -> ToolFunction:
        schema = self.parameters or {}
        properties, required = schema.get("properties"), schema.get("required")
        wrong = None
        if schema.get("type", "object") != "object":
            wrong = 'must be the schema of an object (its "type" is "object")'
        elif not (properties is None or isinstance(properties, dict)):
            wrong = '"properties" must be an object, which has a schema for each argument'
        elif not all(isinstance(value, dict | bool) for value in (properties or {}).values()):
            wrong = "each of its properties must be a schema: an object, or true or false"
        elif not (required is None or (isinstance(required, list) and all(isinstance(name, str) for name in required))):
            wrong = '"required" must be a list of names'
        if wrong:
            raise PydanticCustomError("field:parameters", "parameters: {wrong}", {"wrong": wrong})
        return self


class ToolBody(BodyModel):
    type: Literal["function"]
    function: ToolFunction
    _keys: tuple[str, ...] = PrivateAttr(())  # of the function, in the client's order

    @model_validator(mode="wrap")
    @classmethod
    def _remember_the_order(cls, data: Any, handler: Any) -> ToolBody:
        body: ToolBody = handler(data)
        body._keys = tuple(data["function"]) if isinstance(data, dict) else _FOR_TEMPLATES
        return body

    @property
    def tool(self) -> Tool:
        function = self.function
        parameters = _NO_PARAMETERS if function.parameters is None else function.parameters
        return Tool(function.name, parameters, function.strict is True)

    def for_template(self) -> JSON:
        """As chat templates expect it and models were trained on: without what speaks to the server alone."""
        told = {
            "name": self.function.name,
            "description": self.function.description,
            "parameters": self.tool.parameters,
        }
        keys = dict.fromkeys(key for key in (*self._keys, "parameters") if told.get(key) is not None)
        return {"type": "function", "function": {key: told[key] for key in keys}}


class NamedFunction(BodyModel):
    name: str


class NamedTool(BodyModel):
    type: Literal["function"]
    function: NamedFunction


_Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("text")] | Annotated[NamedTool, Tag("object")],
    Discriminator(lambda value: "object" if isinstance(value, dict) else "text"),
]


class ToolsBody(BodyModel):
    """The fields of a chat that are about tools. With `tool_choice` "none" tools are told to the model, as earlier
    calls in the chat may need, and no call is looked for in what it says."""

    older: ClassVar[dict[str, str]] = _OLDER

    tools: ListOf[ToolBody] | None = Field(None, max_length=_MAX_TOOLS)
    tool_choice: _Choice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_forms(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for older, newer in cls.older.items():
            if data.get(older) not in (None, [], "none", "auto"):
                wrong = "{older} is the older form, which is not served: give {newer}"
                raise PydanticCustomError(f"field:{older}", wrong, {"older": older, "newer": newer})
        choice = data.get("tool_choice")
        if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            raise PydanticCustomError(
                "field:tool_choice", "tool_choice of type allowed_tools is not supported: give those tools alone"
            )
        return data

    @model_validator(mode="after")
    def _choice_among_tools(self) -> ToolsBody:
        names = [tool.function.name for tool in self.tools or ()]
        for i, name in enumerate(names):
            if name in names[:i]:
                wrong = "tools: {name} is the name of two of them, tools[{first}] and tools[{i}]"
                context = {"name": name, "first": names.index(name), "i": i}
                raise PydanticCustomError("field:tools", wrong, context)
        choice = self.tool_choice
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise PydanticCustomError(
                "field:tool_choice",
                "tool_choice names {name}, which is none of the tools",
                {"name": choice.function.name[:100]},
            )
        if choice == "required" and not names:
            raise PydanticCustomError("field:tool_choice", "tool_choice is required, and there are no tools to call")
        return self

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Those that the output may call."""
        choice = self.tool_choice
        if choice == "none":
            return ()
        tools = tuple(body.tool for body in self.tools or ())
        return tuple(t for t in tools if t.name == choice.function.name) if isinstance(choice, NamedTool) else tools

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def calls_in_parallel(self) -> bool:
        """Whether a reply may have several calls."""
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)

    @property
    def template_tools(self) -> list[JSON] | None:
        return [tool.for_template() for tool in self.tools] if self.tools else None
