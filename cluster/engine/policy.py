"""In which order requests get their turn: classes of priority, and fairness between users within a class. Pure: knows
nothing of KV blocks or steps.

Fairness is start-time fair queueing (Goyal, Vin, Cheng 1997): each request of a user starts, in virtual time, where the
last one of that user has ended, so that who asks for much waits behind who asks for little. With one user it is first
come, first served.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from isotherm.cluster.engine.sequence import ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest

Turn = tuple[int, bool, float, int]


def cost(request: GenerationRequest) -> int:
    """What a request may take, in tokens: known before it is computed, and the same wherever it is."""
    return len(request.prompt) + request.params.max_tokens


class Waiting:
    """Sequences that hold no KV blocks, first who is next: those of a lower `priority`; of these the ones that have had
    their turn before and were preempted; then by virtual time; then by arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[Turn, ScheduledSequence]] = []  # with entries of sequences that have left
        self._turns: dict[ScheduledSequence, Turn] = {}
        self._now = 0.0  # virtual time: of the sequence that had its turn last
        self._ends: dict[str, float] = {}  # user → when, in virtual time, its last request ends

    def __len__(self) -> int:
        return len(self._turns)

    def __iter__(self) -> Iterator[ScheduledSequence]:
        """In order."""
        return iter(sorted(self._turns, key=self._turns.__getitem__))

    def add(self, sequence: ScheduledSequence) -> None:
        if sequence.virtual_start is None:
            request = sequence.request
            sequence.virtual_start = max(self._now, self._ends.get(request.user, 0.0))
            self._ends[request.user] = sequence.virtual_start + cost(request)
        self._push(sequence)

    def first(self) -> ScheduledSequence | None:
        while self._heap:
            turn, sequence = self._heap[0]
            if self._turns.get(sequence) == turn:
                return sequence
            heapq.heappop(self._heap)
        return None

    def set_aside(self, sequence: ScheduledSequence) -> None:
        """Let the others have their turn before it, until it is added again: then it has its old place."""
        del self._turns[sequence]

    def remove(self, sequence: ScheduledSequence, has_turn: bool = False) -> None:
        """`has_turn`: it is computed now. Else it has been given up, and its user has no less for it."""
        _, _, start, _ = self._turns.pop(sequence)
        if has_turn:
            self._now = max(self._now, start)
        elif not sequence.admitted:
            self._forgo(sequence.request, start)
        if not self._turns:
            self._heap.clear()
        # Who has nothing to wait for any more has no more to make up for than who has never asked.
        self._ends = {user: end for user, end in self._ends.items() if end > self._now}

    def _forgo(self, request: GenerationRequest, start: float) -> None:
        """What a user has asked for after a request that it has given up starts so much earlier."""
        saved = cost(request)
        if request.user in self._ends:
            self._ends[request.user] -= saved
        for other, turn in list(self._turns.items()):
            if other.request.user == request.user and turn[2] > start:
                other.virtual_start = max(self._now, turn[2] - saved)
                self._push(other)

    def _push(self, sequence: ScheduledSequence) -> None:
        assert sequence.virtual_start is not None
        turn = (sequence.request.priority, not sequence.admitted, sequence.virtual_start, sequence.arrival)
        self._turns[sequence] = turn
        heapq.heappush(self._heap, (turn, sequence))


def precedence(sequence: ScheduledSequence) -> tuple[int, int]:
    """Of those that hold KV blocks: who has the greatest one gives way first."""
    return sequence.request.priority, sequence.arrival


def gives_way_to(running: ScheduledSequence, waiting: ScheduledSequence) -> bool:
    """Whether a running sequence must leave its blocks to one that waits: only to a better class, for else two could
    take turns and neither would end."""
    return running.request.priority > waiting.request.priority
