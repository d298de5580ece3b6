"""Packed sequences of training documents, and the loss on them, to which tokens add by their turn. Knows nothing about
the model."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from data import document, held_out
from dialogue import ASSISTANT, EOS, SPECIALS, THINK, USER, Doc
from encoding import Encoded, encode
from fusion import fused
from mix import Mix
from tokenizers import Tokenizer
from torch import Tensor

BATCH_TOKENS = 4096
PROMPT_WEIGHT, END_WEIGHT = 0.1, 0.5


class Lengths(NamedTuple):
    """Which documents a stream has: those of more tokens than `above` and at most `row`, in rows of `row`; `pool` is
    how many it has at hand to fill a row with."""

    above: int
    row: int
    pool: int


# Attention costs by the square of a row, and a token of a short dialogue teaches more than one of a long.
SHORT, MIDDLE, LONG = Lengths(0, 128, 192), Lengths(128, 512, 96), Lengths(512, 1024, 24)
ALL = Lengths(0, 1024, 192)
CONTEXT = 2048


class Packed(NamedTuple):
    """Rows of whole documents. tokens, weights, documents [rows, length]: ids, how much each adds to the loss, and to
    which of `kinds` it belongs (-1: none)."""

    tokens: Tensor
    weights: Tensor
    documents: Tensor
    kinds: list[str]


class Tokens(NamedTuple):
    """A document as tokens: its kind, their ids, and their weights in the loss."""

    kind: str
    ids: list[int]
    weights: list[float]


def weights_of(doc: Doc, encoding: Encoded, special: dict[str, int]) -> list[float]:
    """Loss weight of each token: 1 in the assistant's turns, PROMPT_WEIGHT elsewhere, 0 where the prompt itself or a
    grammar will hold the token, and END_WEIGHT where a value ends that a grammar holds: that it ends is the model's to
    say, and what follows it cannot know."""
    ids = encoding.ids
    if special[USER] not in ids:
        return [1.0] * len(ids)
    out, inside = [], False
    for token in ids:
        out.append(1.0 if inside else PROMPT_WEIGHT)
        if inside and doc.thinks and token == special[THINK]:
            out[-1] = 0.0
        if token in (special[ASSISTANT], special["<｜tool▁output▁end｜>"]):
            inside = True
        elif token == special[EOS]:
            inside = False
    given = doc.given()
    for i, (start, end) in enumerate(encoding.offsets):
        if out[i] == 1.0 and any(at <= start and end <= to for at, to in given):
            out[i] = 0.0
    ends = doc.value_ends()
    for i, (start, end) in enumerate(encoding.offsets):
        if any(start <= at < end for at in ends):
            out[i] = END_WEIGHT
    return out


class Stream:
    """Endless packed rows of documents of some lengths, as the mix has them."""

    def __init__(self, tokenizer: Tokenizer, seed: int, mix: Mix, keep_held_out: bool = False, lengths: Lengths = ALL):
        self.random, self.tokenizer, self.mix = random.Random(seed), tokenizer, mix
        self.keep_held_out, self.lengths = keep_held_out, lengths
        self.special = {s: tokenizer.token_to_id(s) for s in SPECIALS}
        self.pool: list[Tokens] = []

    def state(self) -> dict[str, Any]:
        """All that decides what comes next, in plain types."""
        return dict(random=self.random.getstate(), pool=[tuple(one) for one in self.pool])

    def restore(self, state: dict[str, Any]) -> None:
        version, internal, gauss = state["random"]
        self.random.setstate((version, tuple(internal), gauss))
        self.pool = [Tokens(*one) for one in state["pool"]]

    def documents(self, count: int) -> list[tuple[Doc, Tokens]]:
        """So many at least."""
        out: list[tuple[Doc, Tokens]] = []
        while len(out) < count:
            docs = [document(self.random, self.mix) for _ in range(count)]
            docs = [doc for doc in docs if held_out(doc) == self.keep_held_out]
            encoded = encode(self.tokenizer, docs)
            for doc, encoding in zip(docs, encoded, strict=True):
                if self.lengths.above < len(encoding.ids) <= self.lengths.row:
                    out.append((doc, Tokens(doc.kind, encoding.ids, weights_of(doc, encoding, self.special))))
        return out

    def batch(self, length: int | None = None, size: int = BATCH_TOKENS) -> Packed:
        """`size` tokens in rows, of the stream's length or another. Each row has documents in the order in which they
        were drawn, then the longest that still fit; what is left over at its end weighs nothing."""
        length = length or self.lengths.row
        rows = size // length
        tokens = torch.full((rows, length), self.special[EOS])
        weights, owner = torch.zeros(rows, length), torch.full((rows, length), -1)
        kinds: list[str] = []
        for row in range(rows):
            at = 0
            while at < length:
                if len(self.pool) < self.lengths.pool:
                    self.pool += [made for _, made in self.documents(self.lengths.pool)]
                chosen = self._next(length - at)
                if chosen is None:
                    break
                here = slice(at, at + len(chosen.ids))
                tokens[row, here] = torch.tensor(chosen.ids)
                weights[row, here] = torch.tensor(chosen.weights)
                owner[row, here] = len(kinds)
                kinds.append(chosen.kind)
                at += len(chosen.ids)
        return Packed(tokens, weights, owner, kinds)

    def _next(self, room: int) -> Tokens | None:
        """The oldest document where it fits, else the longest that does."""
        if len(self.pool[0].ids) <= room:
            return self.pool.pop(0)
        fitting = [i for i, one in enumerate(self.pool) if len(one.ids) <= room]
        if not fitting:
            return None
        return self.pool.pop(max(fitting, key=lambda i: len(self.pool[i].ids)))


@fused
def weighted_loss(logits: Tensor, tokens: Tensor, weights: Tensor, ahead: int) -> Tensor:
    """Mean loss of predicting the token `ahead` positions later; the last `ahead` weigh nothing, cheaper than slicing
    the logits."""
    targets, weights = tokens.roll(-ahead, 1), weights.roll(-ahead, 1)
    weights = F.pad(weights[:, :-ahead], (0, ahead))
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (loss * weights.flatten()).sum() / weights.sum()


def guessed_weights(batch: Packed, guess: int) -> Tensor:
    """The weights of tokens as the MTP layer's n-th guess of several: nothing where its first would have begun in
    another document."""
    if guess == 1:
        return batch.weights
    same = batch.documents == batch.documents.roll(guess + 1, 1)
    same[:, : guess + 1] = False
    return batch.weights * same


def right_documents(logits: Tensor, batch: Packed) -> Tensor:
    """Of each document of a batch, whether greedy decoding would give every token of its answers. [documents], bool."""
    wrong = (logits[:, :-1].argmax(-1) != batch.tokens[:, 1:]) & (batch.weights[:, 1:] == 1)
    owners = batch.documents[:, 1:][wrong]
    right = torch.ones(len(batch.kinds), dtype=torch.bool, device=logits.device)
    right[owners] = False
    return right
