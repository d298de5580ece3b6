"""The key that a request brings, in whichever header."""

from __future__ import annotations

from starlette.datastructures import Headers


def presented(headers: Headers) -> str | None:
    """The key's text as OpenAI's clients send it, else as Anthropic's do."""
    kind, _, text = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and text.strip():
        return text.strip()
    return headers.get("x-api-key", "").strip() or None
