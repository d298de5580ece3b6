"""What a body asks its output to be, as the engine's constraint: translated, and checked before anything is queued."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from isotherm.cluster.api.bodies.structure import StructuredBody
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.messages.requests import Constraint
from isotherm.cluster.text import grammar
from isotherm.cluster.text.json_schema import GrammarError
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.cluster.text.tokenizer_files import TokenizerError


def _schema(value: Any) -> str:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the schema is not valid JSON: {error}") from None
    return grammar.json_schema(value)


_GRAMMARS: dict[str, Callable[[Any, Tokenizer], str]] = {
    "schema": lambda value, _: _schema(value),
    "object": lambda *_: grammar.json_object(),
    "regex": lambda value, _: grammar.regex(value),
    "choice": lambda value, _: grammar.choice(value),
    "grammar": lambda value, tokenizer: grammar.grammar(value, tokenizer.control_tokens),
}


def output_grammar(body: StructuredBody, tokenizer: Tokenizer, vocab_size: int) -> str:
    """llguidance's text; empty where the body asks for nothing. Raises ReplyError 400, which names the field and what
    is wrong or too much."""
    if (structure := body.structure) is None:
        return ""
    field, kind, value = structure
    try:
        text = _GRAMMARS[kind](value, tokenizer)
        tokenizer.grammar_vocabulary(vocab_size).check(text)
    except (GrammarError, TokenizerError) as error:
        raise ReplyError(f"{field}: {error}", param=field) from None
    return text


def output_constraint(
    body: StructuredBody, tokenizer: Tokenizer, vocab_size: int, after: tuple[int, ...] = ()
) -> Constraint | None:
    """As `output_grammar`. `after`: as Constraint has it."""
    text = output_grammar(body, tokenizer, vocab_size)
    return Constraint(text, after, body.structure[0]) if text and body.structure else None
