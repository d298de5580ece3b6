"""What the terminal of `isotherm serve` says of ingress replicas and HTTP proxies that are lost. Ray Serve starts them
again by itself, and tells nobody."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable

from ray.exceptions import RayError

from isotherm.cluster.background import spawn_thread
from isotherm.cluster.on_ray.front_door_actors import FrontDoorActor, front_door_actors, front_door_names


class FrontDoorLosses:
    """Says which have crashed or were killed because they hung, and which were started in their place. `actors`: all
    that Ray knows; it is asked only where the names of those that are there have changed, or somebody is missing.
    `killed`: the names of the ingress replicas that the controller's watch has killed, which Ray has as if Serve had
    ended them; asked only where one has ended so."""

    def __init__(self, actors: Callable[[], Iterable[FrontDoorActor]], killed: Callable[[], Collection[str]]) -> None:
        self._actors, self._killed = actors, killed
        self._names: frozenset[str] = frozenset()
        self._settled = False  # each of them was alive at the last look, and nobody missing
        self._alive: set[str] = set()  # by id
        self._missing: list[FrontDoorActor] = []

    def lines(self, names: frozenset[str]) -> list[str]:
        """`names`: of the actors that are there now."""
        if names == self._names and self._settled:
            return []
        actors = list(self._actors())
        gone = [actor for actor in actors if not actor.alive and actor.id in self._alive]
        killed = self._killed() if any(not actor.crashed and not actor.is_proxy for actor in gone) else ()
        lost = {actor: "" for actor in gone if actor.crashed}
        lost |= {actor: ": it hung, and was killed" for actor in gone if not actor.crashed and actor.ingress in killed}
        fresh = [actor for actor in actors if actor.alive and actor.id not in self._alive]
        said = [f"{actor.words} is lost{how}; {_follows(actor)}" for actor, how in lost.items()]
        self._missing += lost
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
    """Looks, and hands what there is to say to `say`. `killed`: as FrontDoorLosses says; it may raise RayError, and is
    asked again at the next look."""

    def __init__(self, say: Callable[[str], None], killed: Callable[[], Collection[str]]) -> None:
        self._say, self._losses = say, FrontDoorLosses(front_door_actors, killed)
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
