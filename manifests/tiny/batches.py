"""Endless packed sequences of training documents, and the loss on them, to which tokens add by their turn. Knows
nothing about the model."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from data import document, held_out
from dialogue import ASSISTANT, EOS, SPECIALS, THINK, USER, Doc
from tokenizers import Tokenizer
from torch import Tensor

BATCH_TOKENS = 4096
# A token of a short dialogue teaches more than one of a long, so each kind has its own steps; now and then a long
# sequence is one whole context.
SHORT_CHARACTERS, SHORT_SEQUENCE, LONG_SEQUENCE, CONTEXT = 220, 256, 1024, 2048
PROMPT_WEIGHT = 0.15


def weights_of(ids: list[int], special: dict[str, int], forced_think: bool) -> list[float]:
    """Loss weight of each token: 1 in the assistant's turns, PROMPT_WEIGHT elsewhere, 0 where the prompt itself will
    hold the token."""
    out, inside = [], False
    for token in ids:
        out.append(1.0 if inside else PROMPT_WEIGHT)
        if inside and forced_think and token == special[THINK]:
            out[-1] = 0.0
        if token in (special[ASSISTANT], special["<｜tool▁output▁end｜>"]):
            inside = True
        elif token == special[EOS]:
            inside = False
    if special[USER] not in ids:
        return [1.0] * len(ids)
    return out


class Stream:
    """Endless packed sequences of documents, positions running through; of short ones, of long ones or of all. Knows
    nothing about the model."""

    def __init__(self, tokenizer: Tokenizer, seed: int, keep_held_out: bool = False, short: bool | None = None):
        self.short = short
        self.random, self.tokenizer, self.keep_held_out = random.Random(seed), tokenizer, keep_held_out
        self.special = {s: tokenizer.token_to_id(s) for s in SPECIALS}
        self.ids: list[int] = []
        self.weights: list[float] = []

    def draw(self) -> Doc:
        while True:
            doc = document(self.random)
            fits = self.short is None or self.short == (len(doc.render()) < SHORT_CHARACTERS)
            if fits and held_out(doc) == self.keep_held_out:
                return doc

    def documents(self, count: int) -> Iterator[tuple[Doc, list[int], list[float]]]:
        docs = [self.draw() for _ in range(count)]
        encoded = self.tokenizer.encode_batch([doc.render() for doc in docs], add_special_tokens=False)
        for doc, encoding in zip(docs, encoded, strict=True):
            yield doc, encoding.ids, weights_of(encoding.ids, self.special, doc.task == "thinking-switch")

    def batch(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """tokens [rows, length] and their loss weights [rows, length]."""
        need = rows * length
        while len(self.ids) < need:
            for _, ids, weights in self.documents(256):
                self.ids += ids
                self.weights += weights
        tokens, weights = torch.tensor(self.ids[:need]), torch.tensor(self.weights[:need])
        del self.ids[:need], self.weights[:need]
        return tokens.view(rows, length), weights.view(rows, length)


def weighted_loss(logits: Tensor, tokens: Tensor, weights: Tensor, ahead: int) -> Tensor:
    """Mean loss of predicting the token `ahead` positions later; the last `ahead` weigh nothing, cheaper than slicing
    the logits."""
    targets, weights = tokens.roll(-ahead, 1), weights.roll(-ahead, 1)
    weights[:, -ahead:] = 0
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (loss * weights.flatten()).sum() / weights.sum()
