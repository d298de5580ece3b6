"""Drafts: what guesses the next tokens, and how many of its guesses a step verifies.

A draft changes how many tokens a step gives, and no token: each of its rows is computed in decode form, as it would be
in a step of its own, and what the model gives there is taken as long as the guesses before it were right. Pure: the
drafter is handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from isotherm.cluster.engine.kv_blocks import BlockManager
from isotherm.cluster.engine.sequence import Chunk, Form, ScheduledSequence


class Drafter(Protocol):
    """Guesses what comes next."""

    kind: str  # mtp | ngram
    looks_back: int  # steps before drafts whose `computed` it needs, at most
    # Of a model, that the last drafts took: the streams of each. None where it had much to catch up with
    passes: Sequence[int]

    def most(self, sequence: ScheduledSequence, room: int) -> int:
        """How many tokens it can guess now, up to `room`."""

    def draft(self, asked: Sequence[tuple[ScheduledSequence, int]]) -> Sequence[Sequence[int]]:
        """For each sequence up to so many tokens that may follow it. Its blocks have room for them."""

    def computed(self, chunks: Sequence[Chunk], rows_TD: Any) -> None:
        """A step was computed and its tokens taken; the model's output for its rows, in the order of the chunks."""


@dataclass
class Candidate:
    """A stream that could have drafts in this step."""

    chunk: int  # its index
    sequence: ScheduledSequence
    most: int
    count: int = 0  # what it is given


def candidates(
    chunks: Sequence[Chunk], drafter: Drafter, tokens: int, budget: int, max_model_len: int
) -> list[Candidate]:
    """The chunks after whose last token drafts can come: in decode form, as long as its request and the model leave
    room for one more token after them. `budget`: tokens that the step still has room for."""
    found = []
    for index, chunk in enumerate(chunks):
        if chunk.form is Form.PREFILL:
            break  # those in decode form come first
        sequence = chunk.sequence
        params = sequence.request.params
        if not chunk.sample or not params.speculate:
            continue
        room = min(params.max_tokens - sequence.generated - 1, max_model_len - len(sequence.tokens) - 1, tokens, budget)
        if room > 0 and (most := drafter.most(sequence, room)) > 0:
            found.append(Candidate(index, sequence, most))
    return found


def with_drafts(
    chunks: Sequence[Chunk], chosen: Sequence[Candidate], drafter: Drafter, blocks: BlockManager
) -> list[Chunk]:
    """The chunks with `count` guesses after each that was chosen, as far as there are blocks that nobody else needs in
    this step."""
    asked: list[tuple[ScheduledSequence, int]] = []
    indices: list[int] = []
    for one in chosen:
        sequence, size = one.sequence, blocks.block_size
        room = (len(sequence.blocks) + blocks.available) * size - len(sequence.tokens)
        if (count := min(one.count, room)) > 0:
            taken = blocks.allocate(max(0, -(-(len(sequence.tokens) + count) // size) - len(sequence.blocks)))
            assert taken is not None
            sequence.blocks += taken
            asked.append((sequence, count))
            indices.append(one.chunk)
    out = list(chunks)
    for index, (_, count), draft in zip(indices, asked, drafter.draft(asked) if asked else (), strict=True):
        tokens = tuple(draft[:count])
        out[index] = out[index]._replace(count=out[index].count + len(tokens), draft=tokens)
    return out
