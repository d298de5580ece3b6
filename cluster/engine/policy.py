"""In which order requests get their turn: classes of priority, and fairness between keys within a class. Pure: knows
nothing of KV blocks or steps.

Fairness is start-time fair queueing (Goyal, Vin, Cheng 1997): each request of an API key starts, in virtual time, where
the last one of that key has ended, so that who asks for much waits behind who asks for little. A key of three times the
weight has its virtual time pass three times as slowly, and so gets three times as many tokens. What a request has not
used of what it might have, its key gets back when it ends. With one key, or none, it is first come, first served.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from isotherm.cluster.engine.sequence import ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest

Turn = tuple[int, bool, float, int]


def cost(request: GenerationRequest) -> int:
    """What a request may take, in tokens: known before it is computed, and the same wherever it is."""
    return len(request.prompt) + request.params.max_tokens


@dataclass
class _Class:
    """The virtual time of one priority: what somebody has of one counts for nothing in another."""

    now: float  # of the sequence that had its turn last
    ends: dict[str, float] = field(default_factory=dict)  # key → when its last request ends
    turns: int = 0  # sequences that wait in it


class Waiting:
    """Sequences that hold no KV blocks, first who is next: those of a lower `priority`; of these the ones that have had
    their turn before and were preempted; then by virtual time; then by arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[Turn, ScheduledSequence]] = []  # with entries of sequences that have left
        self._turns: dict[ScheduledSequence, Turn] = {}
        self._aside: set[ScheduledSequence] = set()
        self._classes: dict[int, _Class] = {}  # those in which somebody waits
        self._passed = 0.0  # virtual time in the classes in which nobody waits any more

    def __len__(self) -> int:
        return len(self._turns)

    def __iter__(self) -> Iterator[ScheduledSequence]:
        """In order."""
        return iter(sorted(self._turns, key=self._turns.__getitem__))

    def add(self, sequence: ScheduledSequence) -> None:
        request = sequence.request
        of_class = self._classes.setdefault(request.priority, _Class(self._passed))
        if sequence.virtual_start is None:
            sequence.virtual_start = max(of_class.now, of_class.ends.get(request.key, 0.0))
            of_class.ends[request.key] = sequence.virtual_start + cost(request) / request.weight
        if sequence in self._aside:
            self._aside.remove(sequence)
        else:
            of_class.turns += 1
        self._turns[sequence] = turn = self._turn(sequence)
        heapq.heappush(self._heap, (turn, sequence))

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
        self._aside.add(sequence)

    def remove(self, sequence: ScheduledSequence, has_turn: bool = False) -> None:
        """`has_turn`: it is computed now. Else it has been given up, and its key has no less for it."""
        _, _, start, _ = self._turns.pop(sequence)
        of_class = self._classes[sequence.request.priority]
        of_class.turns -= 1
        if has_turn:
            of_class.now = max(of_class.now, start)
        elif not sequence.admitted:
            self._give_back(sequence, cost(sequence.request))
        if not self._turns:
            self._heap.clear()  # of entries of those that have left
        self._forget(sequence.request.priority)

    def ended(self, sequence: ScheduledSequence) -> None:
        """It has left after its turn: what it might have used besides is its key's again."""
        if (unused := cost(sequence.request) - len(sequence.tokens)) > 0:
            self._give_back(sequence, unused)

    def _give_back(self, sequence: ScheduledSequence, tokens: int) -> None:
        """What a key has asked for after a request starts so much earlier."""
        request, start = sequence.request, sequence.virtual_start
        of_class = self._classes.get(request.priority)
        if of_class is None or request.key not in of_class.ends or start is None:
            return
        saved = tokens / request.weight
        of_class.ends[request.key] -= saved
        for other, turn in self._turns.items():
            if other.request.key == request.key and turn[0] == request.priority and turn[2] > start:
                other.virtual_start = max(of_class.now, turn[2] - saved)
                self._turns[other] = self._turn(other)
        self._heap = [(turn, other) for other, turn in self._turns.items()]
        heapq.heapify(self._heap)

    def _forget(self, priority: int) -> None:
        """Who has nothing to wait for any more has no more to make up for than who has never asked; nor has anybody
        where nobody waits."""
        of_class = self._classes[priority]
        if of_class.turns:
            of_class.ends = {key: end for key, end in of_class.ends.items() if end > of_class.now}
        else:
            self._passed = max(self._passed, of_class.now, *of_class.ends.values())
            del self._classes[priority]

    @staticmethod
    def _turn(sequence: ScheduledSequence) -> Turn:
        assert sequence.virtual_start is not None
        return sequence.request.priority, not sequence.admitted, sequence.virtual_start, sequence.arrival


def precedence(sequence: ScheduledSequence) -> tuple[int, int]:
    """Of those that hold KV blocks: who has the greatest one gives way first."""
    return sequence.request.priority, sequence.arrival


def gives_way_to(running: ScheduledSequence, waiting: ScheduledSequence) -> bool:
    """Whether a running sequence must leave its blocks to one that waits: only to a better class, for else two could
    take turns and neither would end."""
    return running.request.priority > waiting.request.priority


def victims(running: Sequence[ScheduledSequence], waiting: ScheduledSequence, blocks: int) -> list[ScheduledSequence]:
    """Who of those that run, by precedence, gives way to one that waits, so that it can begin: those that have so many
    blocks, at least one of them; nobody, where that would not be enough."""
    found = []
    for victim in reversed(running):
        if not gives_way_to(victim, waiting):
            break
        found.append(victim)
        blocks -= len(victim.blocks)
        if blocks <= 0:
            return found
    return []
