"""What the terminal of `isotherm serve` says of ingress replicas and HTTP proxies that are lost. Ray Serve starts them
again by itself, and tells nobody."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from ray.exceptions import RayError

from isotherm.cluster.background import spawn_thread
from isotherm.cluster.on_ray.front_door_actors import FrontDoorActor, front_door_actors, front_door_names


class FrontDoorLosses:
    """Says which have crashed, and which were started in their place. `actors`: all that Ray knows; it is asked only
    where the names of those that are there have changed, or somebody is missing."""

    def __init__(self, actors: Callable[[], Iterable[FrontDoorActor]]) -> None:
        self._actors = actors
        self._names: frozenset[str] = frozenset()
        self._settled = False  # each of them was alive at the last look, and nobody missing
        self._alive: set[str] = set()  # by id
        self._missing: list[FrontDoorActor] = []

    def lines(self, names: frozenset[str]) -> list[str]:
        """`names`: of the actors that are there now."""
        if names == self._names and self._settled:
            return []
        actors = list(self._actors())
        crashed = [actor for actor in actors if actor.crashed and actor.id in self._alive]
        fresh = [actor for actor in actors if actor.alive and actor.id not in self._alive]
        said = [f"{actor.words} is lost; {_follows(actor)}" for actor in crashed]
        self._missing += crashed
        for actor in fresh:
            if (before := next((m for m in self._missing if m.is_proxy == actor.is_proxy), None)) is not None:
                self._missing.remove(before)
                said.append(f"{actor.words} was started in the place of process {before.pid}")
        self._alive = {actor.id for actor in actors if actor.alive}
        self._names = names
        self._settled = not self._missing and names <= {actor.name for actor in actors if actor.alive}
        return said


def _follows(actor: FrontDoorActor) -> str:
    if actor.is_proxy:
        return "Ray Serve starts it again, and the connections that it had are closed"
    return "Ray Serve starts another, and the streams that it had end with an error event"


class FrontDoorWatch:
    """Looks, and hands what there is to say to `say`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._losses = say, FrontDoorLosses(front_door_actors)
        self._looking = threading.Lock()

    def look(self) -> None:
        """Returns at once: Ray may be slow to answer, and is asked one look at a time."""
        if self._looking.acquire(blocking=False):
            spawn_thread("look at the front door", self._look, vital=False)

    def _look(self) -> None:
        try:
            for line in self._losses.lines(front_door_names()):
                self._say(line)
        except RayError as error:  # Ray is away; others see to that
            logging.getLogger(__name__).debug("the front door was not looked at: %s", error)
        finally:
            self._looking.release()
