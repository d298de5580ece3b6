"""A step while it is being planned: its chunks so far, and how many more tokens it may have."""

from __future__ import annotations

from isotherm.cluster.engine.sequence import Chunk, ScheduledSequence


class StepPlan:
    """A step of at most `most` tokens. `preemptions`: how many there have been before it."""

    def __init__(self, most: int, preemptions: int) -> None:
        self._most = self.budget = most
        self._preemptions = preemptions
        self.chunks: list[Chunk] = []
        self.held: list[ScheduledSequence] = []  # those that wait for one of their family

    @property
    def tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    def limit(self, most: int) -> None:
        self._most = most
        self.budget = most - self.tokens

    def drop_preempted(self, preemptions: int) -> None:
        """Chunks of sequences that were preempted since; before one of these can be admitted again."""
        if preemptions > self._preemptions:
            self._preemptions = preemptions
            self.chunks = [chunk for chunk in self.chunks if chunk.sequence.running]
            self.budget = self._most - self.tokens
