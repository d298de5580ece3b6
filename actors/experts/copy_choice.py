"""Whether an expert is copied from a peer or read from the checkpoint: by how long each took when it was last done
here. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isotherm.cluster.messages.copies import CopyFrom

REMEMBERED = 600.0  # seconds after which a rate says nothing any more: files leave the page cache, links get busy
# Sources beside the peers, which go by their names: the checkpoint, where its pages are in memory and where not.
CACHED, UNCACHED = "checkpoint, cached", "checkpoint"
LEAST_LIMIT, MOST_LIMIT = 2.0, 10.0  # seconds that a peer has for one expert


class Rates:
    """Seconds that an expert took, by source. What quantising and packing cost is in the checkpoint's, as it is in
    what it is compared with: the time until an expert can be computed with."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, float]] = {}  # source → seconds an expert, when

    def note(self, source: str, experts: int, seconds: float, now: float) -> None:
        """So many experts have come from there in so many seconds; none: it has failed."""
        self._last = {name: (took, at) for name, (took, at) in self._last.items() if now - at <= REMEMBERED}
        self._last[source] = (seconds / experts if experts else math.inf, now)

    def of(self, source: str, now: float) -> float | None:
        """None: not lately."""
        took, at = self._last.get(source, (0.0, -math.inf))
        return took if now - at <= REMEMBERED else None


@dataclass(frozen=True)
class Choice:
    from_peer: bool
    why: str


def choose(wish: CopyFrom, peer: float | None, checkpoint: float | None) -> Choice:
    """By the seconds that an expert takes from either; what is not known is tried, a peer first: its bytes need no
    packing."""
    if wish != "auto":
        return Choice(wish == "peer", f"experts.copy_from is {wish}")
    if peer is None:
        return Choice(True, "how fast its copies are is not known yet")
    if peer == math.inf:
        return Choice(False, "it has failed lately")
    if checkpoint is None:
        return Choice(False, "how fast the checkpoint is, is not known yet")
    words = f"{peer * 1e3:.2f} ms an expert from it, {checkpoint * 1e3:.2f} ms from the checkpoint"
    return Choice(peer < checkpoint, words)


def limit(checkpoint: float | None) -> float:
    """Seconds that a peer has for one expert before it is read instead: some times what reading takes."""
    return MOST_LIMIT if checkpoint is None else min(max(4 * checkpoint, LEAST_LIMIT), MOST_LIMIT)
