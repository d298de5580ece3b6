"""How much background work a step may carry beside requests that people wait for. Pure: told what steps took, it says
what the next one may have.

What a background token adds to a step depends on the machine and the model: next to nothing where a step's time is that
of reading the weights, and nearly all of it where each row has to be computed by a small processor. So it is measured:
the time of steps without background work beside that of steps with it. Each step that others need earns background work
a part of its time, which it spends when it takes part in one; where it costs little it takes part in every step, and
where it costs much in every twentieth, then with all its rows at once, since those are computed together for less.
"""

from __future__ import annotations

import math

# Of the time of steps that others need, at most, is added by background work. What is done for its rows beside the
# steps, where a front door has the same cores, costs those that wait about twice as much again.
GROWTH = 1 / 16
STRETCH = 2.0  # what it may save up for one step, in times that a step takes without it
_DEBT = 10.0  # what it may owe, in the same: one slow step for another reason must not keep it waiting for ever
_MEASURE = 16  # steps with background work in succession before one without it is measured again
_NEW = 0.2  # weight of what was measured last


class Yielding:
    def __init__(self) -> None:
        self._alone: dict[int, float] = {}  # class of sizes → seconds of a step without background work
        self._token: float | None = None  # seconds that one of its tokens adds
        self._earned = 0.0  # seconds that background work may take
        self._shared = 0  # steps with background work since the last one without it

    def allowance(self, tokens: int, wanted: int) -> int:
        """How many of `wanted` background tokens the next step may have beside so many others."""
        alone = self._alone.get(tokens.bit_length())
        if alone is None or self._shared >= _MEASURE:
            return 0
        affordable = math.floor(self._earned / max(self._token_cost(alone), 1e-9))
        if affordable >= wanted:
            return wanted
        # At least one token once it has saved all that it may, whatever a token is thought to cost: only where one is
        # computed does it show what it costs.
        return max(1, affordable) if self._earned >= STRETCH * alone else 0

    def took(self, tokens: int, background: int, seconds: float) -> None:
        """A step of so many tokens of others, at least one, and so many of background work took this long."""
        size = tokens.bit_length()
        alone = self._alone.get(size)
        if background == 0:
            self._shared = 0
            if alone is not None:
                seconds = alone + _NEW * (min(seconds, STRETCH * alone) - alone)
            self._alone[size] = alone = seconds
        elif alone is not None:
            self._shared += 1
            added = max(0.0, seconds - alone)
            before = self._token_cost(alone)
            self._token = before + _NEW * (min(added / background, STRETCH * before) - before)
            self._earned = max(self._earned - added, -_DEBT * alone)
        if alone is not None:
            self._earned = min(self._earned + GROWTH * alone, STRETCH * alone)

    def _token_cost(self, alone: float) -> float:
        """Until it is known, half of a step."""
        return alone / 2 if self._token is None else self._token
