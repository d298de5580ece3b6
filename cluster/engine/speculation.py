"""Speculation in one engine: a drafter, how long its drafts are, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from isotherm.cluster.engine.draft_lengths import DraftLengths, Tries
from isotherm.cluster.engine.drafts import Candidate, Drafter, candidates, with_drafts
from isotherm.cluster.engine.kv_blocks import BlockManager
from isotherm.cluster.engine.sequence import Chunk, Form
from isotherm.cluster.messages.meters import SpeculationMeter

KINDS = ("auto", "mtp", "ngram", "off")
MOST = 8  # drafts of a stream in one step
TIMED_EVERY = 32  # steps in which no drafts are due, of which one is timed: that takes time itself
FRUITLESS = 8  # steps in a row with nothing to guess from, after which one of so many looks for it: that takes time too
PAUSE = 256  # steps without drafts after what they need was lost; doubled each time in a row


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
        self.stopped = ""  # why there are none
        self._paused, self._pause = 0, PAUSE  # steps until there are some again, and for how many the next pause is
        self.steps = self.drafted = 0
        self._tries = Tries(1.0, [0.0] * tokens, [0.0] * tokens)
        self._begun = 0.0
        self._skipped = False  # whether no drafts were due in the step under way
        self._passed_over, self._is_out = 0, False  # steps to come that it has no part in; whether the one under way is
        self._fruitless, self._rests = 0, False  # such steps in a row; whether the step under way looks for nothing

    def sits_out(self) -> bool:
        """Whether it has no part in the step that begins: then `extended` and `completed` are not called for it. Most
        steps in which no drafts are due are such: where a step takes less than a millisecond, a few calls show."""
        self._is_out = self._passed_over > 0 or self.is_over
        self._passed_over = max(0, self._passed_over - 1)
        return self._is_out

    def extended(
        self, chunks: Sequence[Chunk], blocks: BlockManager, max_batch_tokens: int, max_model_len: int
    ) -> Sequence[Chunk]:
        """A step's chunks with drafts. Raises what the drafter raises."""
        self._go_on()
        try:
            self._skipped = bool(self.stopped) or (self.lengths is not None and self.lengths.skips_step())
            self._rests = not self._skipped and self._rest()
            if self._skipped or self._rests:
                return chunks
            return self._extended(chunks, blocks, max_batch_tokens, max_model_len)
        finally:
            self._begun = self.clock()

    def _extended(
        self, chunks: Sequence[Chunk], blocks: BlockManager, max_batch_tokens: int, max_model_len: int
    ) -> Sequence[Chunk]:
        begin = self.clock()
        rows = sum(chunk.count for chunk in chunks)
        found = candidates(chunks, self.drafter, self.tokens, max_batch_tokens - rows, max_model_len)
        if found:
            self._fruitless = 0
        elif chunks and chunks[0].form is not Form.PREFILL:
            self._fruitless += 1
        chosen = self._chosen(rows, found, max_batch_tokens - rows)
        if not chosen:
            return chunks
        out = with_drafts(chunks, chosen, self.drafter, blocks)
        self._pause = PAUSE
        if self.lengths is not None and any(chunk.draft for chunk in out):
            self.lengths.drafting_took(self.drafter.passes, self.clock() - begin)
        return out

    def _rest(self) -> bool:
        """Whether the step that begins is one of those that look for nothing; counts it where there may be such."""
        if self.lengths is None or self._fruitless < FRUITLESS:
            return False
        self._fruitless += 1
        return self._fruitless % FRUITLESS != 0

    def stop(self, why: str) -> None:
        """No drafts from now on."""
        self.stopped, self._paused = why, 0

    def pause(self, why: str) -> int:
        """No drafts for some steps → how many."""
        self.stop(why)
        self._paused, self._pause = self._pause, 2 * self._pause
        return self._paused

    def _go_on(self) -> None:
        if self._paused:
            self._paused -= 1
            if not self._paused:
                self.stopped = ""

    @property
    def is_over(self) -> bool:
        """There are no drafts any more."""
        return bool(self.stopped) and not self._paused

    @property
    def listens(self) -> bool:
        """Whether the drafter is to be told of this step: there are drafts, or there will be so soon that it needs it.
        Else what it would keep is thrown away, and with many streams that shows."""
        if self._is_out:
            return False
        steps = self._paused if self.stopped else 0 if self.lengths is None else self.lengths.steps_to_probe
        return not self.is_over and steps <= self.drafter.looks_back

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
        if self._rests or (self._skipped and not self._times_skipped()):
            return
        if self.lengths is not None and chunks[-1].form is Form.DECODE:
            steps = 1 + self._passed_over
            self.lengths.took(sum(chunk.count for chunk in chunks), self.clock() - self._begun, steps)
        verified = False
        for chunk in chunks:
            if chunk.draft:
                tried, right = chunk.sequence.verified
                verified = True
                self.drafted += len(chunk.draft)
                self._tries.add(tried, right)
                if self.lengths is not None:
                    self.lengths.verified(chunk.sequence, tried, right)
        self.steps += verified

    def _times_skipped(self) -> bool:
        """Whether a step in which no drafts were due is timed; those to come that are not, and that the drafter need
        not be told of, are passed over."""
        if self.lengths is None or self.stopped:
            return False
        self._passed_over = self.lengths.pass_over(TIMED_EVERY - 1, self.drafter.looks_back)
        return self._passed_over > 0 or self.lengths.steps_to_probe % TIMED_EVERY == 0

    def meter(self) -> SpeculationMeter:
        choice = None if self.lengths is None else self.lengths.choice
        return SpeculationMeter(
            kind=self.drafter.kind,
            drafted=self.drafted,
            tried=tuple(map(int, self._tries.tried)),
            accepted=tuple(map(int, self._tries.right)),
            steps=self.steps,
            gain=1.0 if choice is None or self.stopped else choice.gain,
            why=self.stopped or ("every draft there can be" if choice is None else choice.why),
        )
