"""The names under which a chat has functions of namespaces, and the way back. Pure.

OpenAI's models call a function by namespace and name, while a chat has one name for each: the two together."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

from isotherm.cluster.api.bodies.responses import FunctionChoice, NamespaceChoice, OfferedFunction
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.jsontypes import JSON

_MOST_CHARS = 128  # of a chat's function's name
_UNNAMED = "functions"  # the namespace that is none: OpenAI's models know functions without one by that name


class FunctionNames:
    """Of one request. A function without a namespace keeps its name; of the others no two have the same."""

    def __init__(self, functions: Iterable[OfferedFunction]) -> None:
        self._functions = list(functions)
        self._flat: dict[tuple[str | None, str], str] = {}
        taken: set[str] = set()
        for one in sorted(self._functions, key=lambda one: one.namespace is not None):
            if (key := _key(one)) not in self._flat:
                self._flat[key] = flat = _free(key, taken)
                taken.add(flat)
        self._said: dict[str, tuple[str, str]] = {
            flat: (namespace, name) for (namespace, name), flat in self._flat.items() if namespace is not None
        }

    def of(self, namespace: str | None, name: str) -> str:
        """The name in the chat of a function, which may be offered no more."""
        return self._flat.get((namespace, name)) or flat_name(namespace, name)

    def offered(self) -> list[tuple[str, OfferedFunction]]:
        """All functions in their order, each with its name in the chat."""
        return [(self._flat[_key(one)], one) for one in self._functions]

    def said(self, flat: str) -> JSON:
        """What a call says of the function that the model has called by this name."""
        if flat not in self._said:
            return {"name": flat}
        namespace, name = self._said[flat]
        return {"namespace": namespace, "name": name}

    def chosen(self, choice: FunctionChoice | NamespaceChoice, param: str) -> list[str]:
        """The names in the chat of what a choice names. Raises ReplyError where that is none, or not one."""
        if isinstance(choice, NamespaceChoice):
            found = [flat for (namespace, _), flat in self._flat.items() if namespace == choice.name]
        elif (exact := self._flat.get((choice.namespace, choice.name))) is not None:
            found = [exact]
        elif choice.namespace is None:
            found = [flat for (_, name), flat in self._flat.items() if choice.name in (name, flat)]
            if len(found) > 1:
                of = " and ".join(self._said[flat][0] for flat in found)
                raise ReplyError(f"{param}: {choice.name!r} is a function of {of}; give its namespace", param=param)
        else:
            found = []
        if not found:
            raise ReplyError(f"{param}: {choice.name[:100]!r} is none of tools", param=param)
        return found


def flat_name(namespace: str | None, name: str) -> str:
    """One name for both, of bounded length."""
    if namespace in (None, _UNNAMED):
        return name
    assert namespace is not None
    flat = namespace + ("" if namespace.endswith("__") else "__") + name
    return flat if len(flat) <= _MOST_CHARS else _marked(flat, flat)


def _key(one: OfferedFunction) -> tuple[str | None, str]:
    return (None if one.namespace is None else one.namespace.name), one.tool.name


def _free(key: tuple[str | None, str], taken: Collection[str]) -> str:
    """The name for both, marked where another function has it."""
    flat = found = flat_name(*key)
    while found in taken:
        found = _marked(flat, f"{found}/{key}")
    return found


def _marked(name: str, of: str) -> str:
    """As much of the name as there is room for, and a digest that tells it from others that begin so."""
    digest = hashlib.blake2b(of.encode(), digest_size=6).hexdigest()
    return f"{name[: _MOST_CHARS - len(digest) - 1]}_{digest}"
