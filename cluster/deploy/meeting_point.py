"""Where the two ends of a new link find each other: a key-value store that the controller hosts, for kinds of links
that need one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import ray

from isotherm.cluster.control.link_choice import WITHOUT_STORE

if TYPE_CHECKING:
    from isotherm.actors.links.rendezvous import Rendezvous


def _open() -> Rendezvous:
    from isotherm.actors.links.rendezvous import Rendezvous

    return Rendezvous(ray.util.get_node_ip_address())


class MeetingPoint:
    """The store is opened when the first link needs it: it is PyTorch's, and a controller that has not imported that
    starts, and comes back, a second earlier."""

    def __init__(self) -> None:
        self._rendezvous: Rendezvous | None = None
        self._opens = asyncio.Lock()

    async def address(self, kind: str) -> tuple[str, int]:
        """Host and port for links of this kind; "" and 0 for one that needs no store."""
        if kind in WITHOUT_STORE:
            return "", 0
        async with self._opens:
            if self._rendezvous is None:
                self._rendezvous = await asyncio.to_thread(_open)
        return self._rendezvous.host, self._rendezvous.port
