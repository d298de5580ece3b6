"""What another route's body is as a chat, and how an error about the chat is said to who sent that body. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.jsontypes import JSON


@dataclass(frozen=True)
class Translation:
    """`chat` is a body of /v1/chat/completions. `origins`: from a field of it, written as errors name it, to the one of
    the route's own body that it was made of; fields of one name in both are not in it."""

    chat: JSON
    origins: Mapping[str, str]

    def at_origin(self, error: ReplyError) -> ReplyError:
        """The error, about the field that the client has given."""
        if error.param is None or (param := self._origin(error.param)) == error.param:
            return error
        return ReplyError(
            _renamed(error.message, error.param, param),
            status=error.status,
            param=param,
            code=error.code,
            kind=error.kind,
            headers=error.headers,
        )

    def _origin(self, param: str) -> str:
        """By the longest beginning of the field's name that is known. Messages are made of items of another form, so
        what lies inside of one has no name of its own."""
        end = len(param)
        while end > 0:
            if (origin := self.origins.get(param[:end])) is not None:
                return origin if param.startswith("messages") else origin + param[end:]
            end = max(param.rfind(".", 0, end), param.rfind("[", 0, end))
        return param


def _renamed(message: str, chat_param: str, param: str) -> str:
    """A message begins with the field's name, whole or its last part alone."""
    for name in (chat_param, chat_param.rpartition(".")[2]):
        rest = message.removeprefix(name)
        if rest != message and not (rest[:1].isalnum() or rest[:1] == "_"):
            return param + rest
    return f"{param}: {message}"


def function_tool(name: str, description: str | None, parameters: JSON | None, strict: bool | None) -> JSON:
    """A tool as chats have it; what was not given is not there."""
    given = {"description": description, "parameters": parameters, "strict": strict}
    return {
        "type": "function",
        "function": {"name": name, **{key: value for key, value in given.items() if value is not None}},
    }


def function_call(call_id: str, name: str, arguments: str) -> JSON:
    """A call of an assistant message."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def text_parts(texts: list[str]) -> str | list[JSON]:
    """The content of a message: one text as it is, several as parts; none is an empty one."""
    return "".join(texts) if len(texts) < 2 else [{"type": "text", "text": text} for text in texts]
