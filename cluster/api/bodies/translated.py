"""What the bodies of routes share that are made into chats: fields of a chat that such a route does not know itself are
taken too, under the chat's own names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pydantic import ConfigDict, Discriminator, model_validator
from pydantic_core import PydanticCustomError

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.common import RequestBody
from isotherm.cluster.jsontypes import JSON


def by_word(
    field: str, words: Sequence[str], what: str, absent: Callable[[JSON], str] = lambda value: ""
) -> Discriminator:
    """Tells the members of a union apart by a word in `field`: the tag of each is its word and `what`, which is no name
    of a field (tags stand in pydantic's paths beside those). `absent` gives the word where there is none."""

    def tag(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f"{words[0]} {what}"  # it will say that it is none
        word = absent(value) if value.get(field) is None else value[field]
        return f"{word} {what}" if isinstance(word, str) and word in words else None

    allowed = " or ".join(words)
    return Discriminator(
        tag, custom_error_type=f"field:{field}", custom_error_message=f"must be {allowed}; others are not taken"
    )


_CHAT_FIELDS = {field.alias or name for name, field in ChatBody.model_fields.items()} | ChatBody.neutral.keys()


class TranslatedBody(RequestBody):
    """A body that is made into a chat's. `renamed`: what a chat calls otherwise, and what it is called here; a client
    that gives it would believe that it counts."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    # A chat's fields for whose results the replies of these routes have no place.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "logprobs": (False,),
        "prompt_logprobs": (),
        "return_token_ids": (False,),
    }
    renamed: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_the_chats_names(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, here in cls.renamed.items():
                if data.get(name) is not None:
                    raise PydanticCustomError(
                        f"field:{name}", "{name} is no field of this route; give {here}", {"name": name, "here": here}
                    )
        return data

    @property
    def passed(self) -> JSON:
        """The fields that go on as they are, such as `seed` or `min_p`."""
        others = self.model_extra or {}
        return {name: value for name, value in others.items() if name in _CHAT_FIELDS and value is not None}
