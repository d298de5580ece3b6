"""What a body may ask its output to be: OpenAI's response_format, vLLM's structured_outputs and guided_* fields,
and SGLang's and llama.cpp's names for them. One of them at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from isotherm.cluster.api.bodies.common import BodyModel, ListOf, NonEmpty
from isotherm.cluster.jsontypes import JSON

MAX_OPTIONS = 4096


def _kind(value: Any) -> str:
    return {str: "text", bool: "any", dict: "object"}.get(type(value), "object")


def _not_false(value: Any) -> Any:
    if value is False:
        raise PydanticCustomError("schema", "must be a JSON schema by which something is valid: an object, or true")
    return value


# A JSON schema: an object, its text, or true for any JSON.
_Schema = Annotated[
    Annotated[NonEmpty, Tag("text")]
    | Annotated[Literal[True], BeforeValidator(_not_false), Tag("any")]
    | Annotated[JSON, Tag("object")],
    Discriminator(_kind),
]
_Options = Annotated[ListOf[NonEmpty], Field(min_length=1, max_length=MAX_OPTIONS)]


class TextFormat(BodyModel):
    type: Literal["text"]


class JsonObjectFormat(BodyModel):
    type: Literal["json_object"]
    of_schema: _Schema | None = Field(None, alias="schema")


class NamedSchema(BodyModel):
    name: str | None = None
    strict: bool | None = None  # the schema holds in any case
    of_schema: _Schema = Field(alias="schema")


class JsonSchemaFormat(BodyModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


def _form(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"a {kind}" if isinstance(kind, str) else None


# The tags are no names of fields: they stand in pydantic's paths beside those.
_ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("a text")]
    | Annotated[JsonObjectFormat, Tag("a json_object")]
    | Annotated[JsonSchemaFormat, Tag("a json_schema")],
    Discriminator(
        _form,
        custom_error_type="response_format",
        custom_error_message="must be an object whose type is text, json_object or json_schema",
    ),
]


class StructuredOutputs(BodyModel):
    """vLLM's."""

    of_json: _Schema | None = Field(None, alias="json")
    regex: NonEmpty | None = None
    choice: _Options | None = None
    grammar: NonEmpty | None = None
    json_object: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        for name in ("structural_tag", "whitespace_pattern", "disable_additional_properties"):
            if isinstance(data, dict) and data.get(name) not in (None, False):
                raise PydanticCustomError(f"field:{name}", "{name} is not supported; leave it out", {"name": name})
        return data

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        asked = [name for name, value in self if value is not None and value is not False]
        if len(asked) != 1:
            raise PydanticCustomError(
                "structured_outputs", "must have exactly one of json, regex, choice, grammar and json_object"
            )
        return self


class StructuredBody(BodyModel):
    """The fields by which a body says what its output is to be."""

    response_format: _ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _Schema | None = None
    guided_regex: NonEmpty | None = None
    guided_choice: _Options | None = None
    guided_grammar: NonEmpty | None = None
    json_schema: _Schema | None = None
    regex: NonEmpty | None = None
    ebnf: NonEmpty | None = None
    grammar: NonEmpty | None = None

    @model_validator(mode="after")
    def _one_structure(self) -> StructuredBody:
        asked = list(self._structures())
        differing = [field for field, *what in asked if what != list(asked[0][1:])]  # some clients say one thing twice
        if differing:
            first, second = (field.partition(".")[0] for field in (asked[0][0], differing[0]))
            raise PydanticCustomError(
                f"field:{second}",
                "{second} and {first} both say what the output is to be; give one of them",
                {"first": first, "second": second},
            )
        return self

    @property
    def structure(self) -> tuple[str, str, Any] | None:
        """What the output is to be: the field that says so, its kind (schema, object, regex, choice or grammar), and
        the value."""
        return next(self._structures(), None)

    def _structures(self) -> Iterator[tuple[str, str, Any]]:
        form = self.response_format
        if isinstance(form, JsonSchemaFormat):
            yield "response_format.json_schema.schema", "schema", form.json_schema.of_schema
        elif isinstance(form, JsonObjectFormat):
            if form.of_schema is None:
                yield "response_format", "object", None
            else:
                yield "response_format.schema", "schema", form.of_schema
        if (of := self.structured_outputs) is not None:
            for name, kind, value in (
                ("json", "schema", of.of_json),
                ("regex", "regex", of.regex),
                ("choice", "choice", of.choice),
                ("grammar", "grammar", of.grammar),
                ("json_object", "object", of.json_object or None),
            ):
                if value is not None:
                    yield f"structured_outputs.{name}", kind, value
        for name, kind in _FLAT:
            if (value := getattr(self, name)) is not None:
                yield name, kind, value


_FLAT = (
    ("guided_json", "schema"),
    ("guided_regex", "regex"),
    ("guided_choice", "choice"),
    ("guided_grammar", "grammar"),
    ("json_schema", "schema"),
    ("regex", "regex"),
    ("ebnf", "grammar"),
    ("grammar", "grammar"),
)

# A letter of a name may be written as an escape.
_NAMES = re.compile(rf'"(?:{"|".join(StructuredBody.model_fields)})"|\\u00[567]'.encode())


def may_be_structured(raw: bytes) -> bool:
    """Whether a body that has not been read yet may ask for a structure, whose check may take long; true at times of
    one that does not."""
    return _NAMES.search(raw) is not None
