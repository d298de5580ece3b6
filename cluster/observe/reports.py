"""What ingress replicas have reported to the controller. Pure but for the clock that it is given."""

from __future__ import annotations

import time
from collections.abc import Callable

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.figures import Figures

SILENCE = 60.0  # seconds after which a replica that reports nothing is forgotten: longer than from scrape to scrape


class Reports:
    """By replica. A controller that comes back knows them again as soon as they have reported."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._figures: dict[str, Figures] = {}
        self._requests: dict[str, JSON] = {}
        self._heard: dict[str, float] = {}

    def take(self, ingress: str, figures: Figures, requests: JSON | None = None) -> None:
        self._heard[ingress] = self._clock()
        self._figures[ingress] = figures
        if requests is not None:
            self._requests[ingress] = requests

    def figures(self) -> dict[str, Figures]:
        self._forget()
        return dict(sorted(self._figures.items()))

    def requests(self) -> dict[str, JSON]:
        """What each replica has reported last of its requests."""
        self._forget()
        return dict(self._requests)

    def _forget(self) -> None:
        silent = [name for name, heard in self._heard.items() if heard < self._clock() - SILENCE]
        for name in silent:
            for known in (self._figures, self._requests, self._heard):
                known.pop(name, None)
