"""Whether this process still is the newest controller; one that is not must not act, and ends."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from isotherm.cluster.errors import named_line
from isotherm.cluster.messages.membership import SupersededError
from isotherm.cluster.on_ray.state_store import StateStore

log = logging.getLogger(__name__)
PERIOD = 5.0  # seconds between two looks


def end_if_superseded(store: StateStore) -> None:
    """Ends this process where a newer controller has been started: it was taken for dead and is not."""
    try:
        store.check()
    except SupersededError as error:
        log.error("%s; this one ends", error)
        os._exit(1)


async def watch_standing(store: StateStore, until: Callable[[], bool]) -> None:
    """Look again and again, until it ends anyway."""
    while not until():
        await asyncio.sleep(PERIOD)
        try:
            await asyncio.to_thread(end_if_superseded, store)
        except Exception as error:  # Ray's head is away
            log.warning("cannot see whether there is a newer controller: %s", named_line(error))
