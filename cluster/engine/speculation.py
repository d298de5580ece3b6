"""Speculation in one engine: a drafter, how long its drafts are, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from isotherm.cluster.engine.draft_lengths import DraftLengths
from isotherm.cluster.engine.drafts import Candidate, Drafter, candidates, with_drafts
from isotherm.cluster.engine.kv_blocks import BlockManager
from isotherm.cluster.engine.sequence import Chunk, Form
from isotherm.cluster.messages.meters import SpeculationMeter

KINDS = ("auto", "mtp", "ngram", "off")
MOST = 8  # drafts of a stream in one step


class Speculation:
    """`lengths`: how many drafts each stream of a step has; None: as many as there can be. `clock` gives seconds."""

    def __init__(
        self,
        drafter: Drafter,
        tokens: int,
        lengths: DraftLengths | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        if not 1 <= tokens <= MOST:
            raise ValueError(f"drafts have {tokens} tokens; it must be 1 to {MOST}")
        self.drafter, self.tokens, self.lengths, self.clock = drafter, tokens, lengths, clock
        self.stopped = ""  # why there is none any more
        self.steps = self.drafted = 0
        self._tried, self._accepted = [0] * tokens, [0] * tokens
        self._begun = 0.0

    def extended(
        self, chunks: Sequence[Chunk], blocks: BlockManager, max_batch_tokens: int, max_model_len: int
    ) -> Sequence[Chunk]:
        """A step's chunks with drafts."""
        out, begin = chunks, self.clock()
        if not self.stopped and (self.lengths is None or not self.lengths.is_idle):
            rows = sum(chunk.count for chunk in chunks)
            found = candidates(chunks, self.drafter, self.tokens, max_batch_tokens - rows, max_model_len)
            chosen = self._chosen(rows, found, max_batch_tokens - rows)
            if chosen:
                out = with_drafts(chunks, chosen, self.drafter, blocks)
                if self.lengths is not None and any(chunk.draft for chunk in out):
                    self.lengths.drafting_took(self.drafter.passes, self.clock() - begin)
        self._begun = self.clock()
        return out

    def _chosen(self, rows: int, found: Sequence[Candidate], budget: int) -> Sequence[Candidate]:
        if self.lengths is not None:
            chosen: Sequence[Candidate] = self.lengths.choose(rows, found)
        else:
            chosen = found
            for one in found:
                one.count = one.most
        for one in chosen:  # none may have what another has got
            one.count = min(one.count, budget)
            budget -= one.count
        return [one for one in chosen if one.count]

    def completed(self, chunks: Sequence[Chunk]) -> None:
        """A step whose chunks `extended` gave is computed, and its tokens are taken."""
        if self.lengths is not None and chunks[-1].form is Form.DECODE:
            self.lengths.took(sum(chunk.count for chunk in chunks), self.clock() - self._begun)
        verified = False
        for chunk in chunks:
            if drafted := len(chunk.draft):
                accepted = max(0, chunk.sequence.computed - chunk.start - chunk.known)
                verified = True
                self.drafted += drafted
                for at in range(min(drafted, accepted + 1)):
                    self._tried[at] += 1
                    self._accepted[at] += at < accepted
                if self.lengths is not None:
                    self.lengths.verified(chunk.sequence, drafted, accepted)
        self.steps += verified

    def meter(self) -> SpeculationMeter:
        choice = None if self.lengths is None else self.lengths.choice
        return SpeculationMeter(
            kind=self.drafter.kind,
            drafted=self.drafted,
            tried=tuple(self._tried),
            accepted=tuple(self._accepted),
            steps=self.steps,
            gain=1.0 if choice is None or self.stopped else choice.gain,
            why=self.stopped or ("every draft there can be" if choice is None else choice.why),
        )
