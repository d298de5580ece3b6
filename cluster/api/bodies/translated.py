"""What the bodies of routes share that are made into chats: fields of a chat that such a route does not know itself are
taken too, under the chat's own names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from pydantic import ConfigDict, Discriminator

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.common import RequestBody
from isotherm.cluster.jsontypes import JSON


def by_word(
    field: str,
    words: Sequence[str],
    what: str,
    absent: Callable[[JSON], str] = lambda value: "",
    kinds: Mapping[str, str] = MappingProxyType({}),
) -> Discriminator:
    """Tells the members of a union apart by a word in `field`: the tag of each is its word and `what`, which is no name
    of a field (tags stand in pydantic's paths beside those). `absent` gives the word where there is none. Words of one
    of the `kinds` share its tag."""

    def tag(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f"{words[0]} {what}"  # it will say that it is none
        word = absent(value) if value.get(field) is None else value[field]
        return f"{kinds.get(word, word)} {what}" if isinstance(word, str) and word in words else None

    allowed = " or ".join(words)
    return Discriminator(
        tag, custom_error_type=f"field:{field}", custom_error_message=f"must be {allowed}; others are not taken"
    )


_CHAT_FIELDS = {field.alias or name for name, field in ChatBody.model_fields.items()} | ChatBody.neutral.keys()


class TranslatedBody(RequestBody):
    """A body that is made into a chat's."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    # A chat's fields for whose results the replies of these routes have no place.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "logprobs": (False,),
        "prompt_logprobs": (),
        "return_token_ids": (False,),
    }

    @property
    def passed(self) -> JSON:
        """The fields that go on as they are, such as `seed` or `min_p`. Those that ask for nothing here end here."""
        others, here = self.model_extra or {}, self.neutral
        return {n: value for n, value in others.items() if n in _CHAT_FIELDS and n not in here and value is not None}
