"""Prompt lookup: what followed the last tokens where they stood before is guessed to follow them again (Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding). Pure, and needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isotherm.cluster.engine.sequence import Chunk, ScheduledSequence

LENGTH = 3  # tokens that must agree
REACH = 32768  # tokens at the end of a sequence that are looked at: a very long prompt is not indexed in one step


class _Index:
    """Where each run of LENGTH tokens of one sequence ended last, and what is known of it."""

    def __init__(self, begin: int):
        self._after: dict[tuple[int, ...], int] = {}  # run → the index of the token after it
        self._taken = begin

    def find(self, tokens: Sequence[int]) -> int | None:
        """The index after an earlier place of the last tokens."""
        for end in range(max(self._taken, LENGTH), len(tokens)):
            self._after[tuple(tokens[end - LENGTH : end])] = end
        self._taken = max(self._taken, len(tokens))
        return self._after.get(tuple(tokens[-LENGTH:])) if len(tokens) > LENGTH else None


class NgramDrafter:
    kind, looks_back = "ngram", 0
    passes: Sequence[int] = ()

    def most(self, sequence: ScheduledSequence, room: int) -> int:
        return room if self._found(sequence) is not None else 0

    def _found(self, sequence: ScheduledSequence) -> int | None:
        index = sequence.drafting
        if not isinstance(index, _Index):
            index = sequence.drafting = _Index(max(0, len(sequence.tokens) - REACH))
        return index.find(sequence.tokens)

    def draft(self, asked: Sequence[tuple[ScheduledSequence, int]]) -> list[list[int]]:
        drafts = []
        for sequence, count in asked:
            tokens, after = sequence.tokens, self._found(sequence)
            draft: list[int] = []
            if after is not None:
                for at in range(after, after + count):
                    # What repeats itself goes on with what is just guessed.
                    draft.append(tokens[at] if at < len(tokens) else draft[at - len(tokens)])
            drafts.append(draft)
        return drafts

    def computed(self, chunks: Sequence[Chunk], rows_TD: Any) -> None:
        pass
