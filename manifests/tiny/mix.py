"""How often each kind of document is drawn: by its weight, and the more of its answers are still wrong, the more often.
Knows no documents."""

from __future__ import annotations

from dataclasses import dataclass, field

LEAST = 0.15  # the share of its weight that a kind keeps when all its answers are right
ENOUGH = 0.02  # the share of wrong answers that a kind has just its weight at: what the model may have wrong at all
MEMORY = 0.02  # how much the newest answer counts in the share of wrong ones


@dataclass
class Mix:
    """The shares of wrong answers that training itself has met, by kind."""

    wrong: dict[str, float] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)  # how many times as often some kinds are drawn, as one asks

    def share(self, kind: str) -> float:
        """In proportion to the wrong ones, and LEAST where there are hardly any."""
        return max(LEAST, self.wrong.get(kind, 1.0) / ENOUGH)

    def record(self, kind: str, right: bool) -> None:
        before = self.wrong.get(kind, 1.0)
        self.wrong[kind] = before + MEMORY * ((not right) - before)
