"""Serve's proxy where Serve itself does not miss it. A check of Serve's may be on its way to a proxy that dies just
after it has started; Ray (2.60) loses such a call now and then, and Serve waits for the answer for as long as a proxy
may take to start, while nothing listens at the port."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors

from isotherm.cluster.background import spawn_thread
from isotherm.cluster.on_ray.front_door_actors import PROXY
from isotherm.cluster.on_ray.ingress_replica import NAMESPACE

# ray/serve/_private/constants.py
CONTROLLER = "SERVE_CONTROLLER_ACTOR"
MISSING_SECONDS = 1.8  # Serve notes a proxy's death within 1.3 s, and then the next one's name is there at once
SAME_SECONDS = 5.0  # from one look to the next in one outage; Ray may be slow, and looks come twice a second
AGAIN_SECONDS = 10.0  # in which a controller that was ended is there again, and has started a proxy


class ProxyRevival:
    """On the driver, asked while nothing listens at the port: whether an actor of that name lives or is being started,
    and where there has been none for too long, Serve's controller is ended. Ray starts it again, it finds the replicas
    that live by their names, and starts the proxy that is missing; no request in flight goes through it."""

    def __init__(self) -> None:
        self._missing_since: float | None = None
        self._looked = 0.0  # the last time
        self._looking = threading.Lock()

    def look(self) -> None:
        """Returns at once: Ray may be slow to answer, and is asked one look at a time."""
        if self._looking.acquire(blocking=False):
            spawn_thread("proxy's revival", self._look, vital=False)

    def lost(self, now: float, names: Iterable[str]) -> bool:
        """Whether, with the actors of these names there at `now`, the proxy has been missing for too long."""
        if now - self._looked > SAME_SECONDS:
            self._missing_since = None  # what was missing in an earlier outage has been there since
        self._looked = now
        if any(name.startswith(PROXY) for name in names):
            self._missing_since = None
            return False
        since = self._missing_since = now if self._missing_since is None else self._missing_since
        if now - since < MISSING_SECONDS:
            return False
        self._missing_since = now + AGAIN_SECONDS - MISSING_SECONDS
        return True

    def _look(self) -> None:
        try:
            actors = list_named_actors(all_namespaces=True)
            if self.lost(time.monotonic(), [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]):
                print("Ray Serve has lost its proxy; its controller is started anew", flush=True)
                ray.kill(ray.get_actor(CONTROLLER, namespace=NAMESPACE), no_restart=False)
        except (ValueError, RayError):  # the controller is being started again, or Ray is going
            logging.getLogger(__name__).warning("Ray Serve's controller was not found", exc_info=True)
        finally:
            self._looking.release()
