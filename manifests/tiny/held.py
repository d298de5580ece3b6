"""Greedy decoding of an answer that is held to a JSON schema, as a server holds it: of each next token only those that
a grammar allows can be said."""

from __future__ import annotations

import json
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from model import CONFIG, Model
from tokenizers import Tokenizer

# On one line, as the server has it.
SPACES = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class Grammars:
    """The grammars of schemas, over one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        size = CONFIG["vocab_size"]
        self._tokens = LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=CONFIG["eos_token_id"])

    def matcher(self, schema: dict[str, Any]) -> LLMatcher:
        return LLMatcher(self._tokens, LLMatcher.grammar_from_json_schema(schema, overrides=SPACES))


def held_answer(model: Model, tokenizer: Tokenizer, prompt: list[int], matcher: LLMatcher, limit: int) -> Any:
    """The JSON that the model says after the prompt; None where it is not whole after `limit` tokens."""
    ids = list(prompt)
    for _ in range(limit):
        bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8) & 1).flatten()[: CONFIG["vocab_size"]].bool()
        token = int(model(torch.tensor([ids]))[0][0, -1].masked_fill(~allowed, float("-inf")).argmax())
        if token == CONFIG["eos_token_id"]:
            return json.loads(tokenizer.decode(ids[len(prompt) :]))
        matcher.consume_token(token)
        ids.append(token)
    return None
