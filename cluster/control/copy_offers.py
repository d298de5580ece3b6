"""Asks groups for leave to copy experts from them; who does not answer in time is left out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from isotherm.cluster.errors import named_line
from isotherm.cluster.messages.copies import CopyOffer, CopySource, Pair

log = logging.getLogger(__name__)
OFFER_SECONDS = 3.0  # in which a group that is well has answered, also while it loads


async def copy_offers(
    wanted: Mapping[str, list[Pair]], ask: Callable[[str], Awaitable[CopyOffer | None]]
) -> list[CopySource]:
    """What the groups offer of what is wanted of each; `ask` gives None for a group whose weights cannot be copied.
    Never raises what asking raises, and returns within OFFER_SECONDS."""

    async def offered(group: str, pairs: list[Pair]) -> CopySource | None:
        try:
            offer = await asyncio.wait_for(ask(group), OFFER_SECONDS)
        except Exception as error:  # it dies, hangs, or obeys another controller: the checkpoint has it all
            log.warning("%s offers no copies of its experts: %s", group, named_line(error))
            return None
        return None if offer is None else CopySource(offer, tuple(pairs))

    found = await asyncio.gather(*(offered(group, pairs) for group, pairs in wanted.items()))
    return [source for source in found if source is not None]
