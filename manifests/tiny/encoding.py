"""Documents as tokens, cut where an answer is easiest to say: a text can be cut in many ways, and which of them a model
speaks is learned. Knows the tokenizer; no loss, no model.

Two rules, for answers alone; all else has the tokenizer's own cut. What `letterwise` marks has a token for each
character. And a word that the text before has too, but nowhere in the tokenizer's cut for here, is cut as there first:
after a space "ason" is Ġas|on and elsewhere ason, so that to repeat it in other surroundings by the tokenizer's cut
takes more than repeating its tokens.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from dialogue import ASSISTANT, EOS, Doc
from tokenizers import Tokenizer

ANSWER = re.compile(f"(?:{ASSISTANT}|<｜tool▁output▁end｜>)(.*?){EOS}", re.DOTALL)
WORD = re.compile(r"[^\W\d_]{2,}")


class Encoded(NamedTuple):
    """Token ids, and where each lies in the rendered text, by characters."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Region(NamedTuple):
    """A part of the text, and the places in it that tokens begin at beside its first."""

    start: int
    end: int
    cuts: list[int]


def encode(tokenizer: Tokenizer, docs: list[Doc]) -> list[Encoded]:
    texts = [doc.render() for doc in docs]
    made = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [
        _recut(tokenizer, text, Encoded(one.ids, one.offsets), [] if doc.text is not None else _regions(doc, text, one))
        for doc, text, one in zip(docs, texts, made, strict=True)
    ]


def _regions(doc: Doc, text: str, made: Encoded) -> list[Region]:
    """What is cut otherwise than the tokenizer does, in the order of the text."""
    letterwise, given = doc.letterwise(), doc.given()
    regions = [Region(start, end, list(range(start + 1, end))) for start, end in letterwise]
    starts = {start for start, _ in made.offsets}
    for answer in ANSWER.finditer(text):
        for word in WORD.finditer(text, *answer.span(1)):
            start, end = word.span()
            if any(a < end and start < b for a, b in (*letterwise, *given)):
                continue
            word_again = rf"(?<![^\W\d_]){word[0]}(?![^\W\d_])"
            here, *there = (
                [i for i in range(1, end - start) if i + begin in starts]
                for begin in (start, *(place.start() for place in re.finditer(word_again, text[:start])))
            )
            if there and here not in there:
                regions.append(Region(start, end, [start + i for i in there[0]]))
    return sorted(regions)


def _recut(tokenizer: Tokenizer, text: str, made: Encoded, regions: list[Region]) -> Encoded:
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []

    def add(start: int, end: int) -> None:
        """One token where there is one for just this text, else what the tokenizer makes of it."""
        token = tokenizer.token_to_id(text[start:end].replace(" ", "Ġ")) if text[start:end].isascii() else None
        if token is None:
            part = tokenizer.encode(text[start:end], add_special_tokens=False)
            ids.extend(part.ids)
            offsets.extend((start + a, start + b) for a, b in part.offsets)
        elif start < end:
            ids.append(token)
            offsets.append((start, end))

    at = 0
    for region in regions:
        while made.offsets[at][1] <= region.start:
            ids.append(made.ids[at])
            offsets.append(made.offsets[at])
            at += 1
        first = last = at
        while made.offsets[last][1] < region.end:
            last += 1
        begin, end = made.offsets[first][0], made.offsets[last][1]
        at = last + 1
        if text[begin : region.start] != " ":  # a space belongs to the token that follows it
            add(begin, region.start)
            begin = region.start
        for cut in (*region.cuts, region.end):
            add(begin, cut)
            begin = cut
        add(region.end, end)
    return Encoded(ids + made.ids[at:], offsets + made.offsets[at:])
