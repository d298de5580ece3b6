"""Another model, or the same with other values, takes the place of the one that serves, as a transaction: its workers
are started beside those that serve, new requests go to them when all are ready, and the others end when their streams
have. Until then whatever fails is undone. Decides; what is done to workers is done by a `Successor`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from isotherm.cluster.control.transactions import Transactions, adopted, reason_of
from isotherm.cluster.errors import named_line
from isotherm.cluster.messages.operations import Operation, Phase

log = logging.getLogger(__name__)
# For which a revision that was rolled away must have had no stream before it ends. One whose shard was lost is nowhere
# while its ingress replica looks for another, which takes it up to RECONNECT of cluster/routing/shard_client.py.
QUIET_SECONDS = 10.0
# After which a revision that was rolled away ends where streams can go on at none of its shards, and there is no room
# for another: by then they have been given up. They wait for a shard up to RESUBMIT_SECONDS of cluster/routing/
# shard_client.py, and for experts as long as ExpertExchange of actors/attention/exchange.py has patience.
NOWHERE_SECONDS = 150.0


class Successor(Protocol):
    """The revision that is to serve, and the one before it."""

    @property
    def waits(self) -> Mapping[str, str]:
        """Worker → the resources that it waits for, in words."""

    async def start(self) -> None:
        """Start its workers, with links and weights. Raises what went wrong."""

    async def announce(self) -> None:
        """Have ingress replicas connect to its shards; return when they had time to."""

    def take_over(self) -> None:
        """From now on new requests go to it, which is written down. Raises, with nothing changed, where a worker of it
        has died or it cannot be written."""

    async def end(self) -> None:
        """End those of its workers that there are."""


async def roll(transactions: Transactions, operation: Operation, successor: Successor, seconds: float) -> bool:
    """Whether it is committed; else everything is as it was, and the operation has ended. `transactions` are those of
    the revision that serves: none of its changes comes in between, and a loss among its workers ends the roll."""
    async with transactions.turn:
        try:
            transactions.enter(operation, Phase.PREPARING)
            await transactions.within(seconds, operation, successor.start(), successor.waits)
            transactions.enter(operation, Phase.COMMITTING)
            await adopted(successor.announce())
            operation.committed, operation.progress = True, 0.9  # what is written down says so
            successor.take_over()
        except Exception as error:
            operation.committed, operation.progress = False, 0.0
            await _roll_back(transactions, operation, successor, reason_of(error, seconds))
            return False
    return True


async def _roll_back(transactions: Transactions, operation: Operation, successor: Successor, reason: str) -> None:
    transactions.enter(operation, Phase.ROLLING_BACK, reason)
    try:
        await successor.end()
    except Exception as error:
        log.exception("operation %s: roll-back failed", operation.id)
        transactions.enter(operation, Phase.FAILED, f"roll-back failed: {named_line(error)}")
        return
    transactions.enter(operation, Phase.ROLLED_BACK)


class Quiet:
    """Whether a revision that was rolled away has finished its streams: is told, again and again, how many requests its
    shards have, and whether streams can go on at any of them. None: not known, for one of its workers was lost or does
    not answer."""

    def __init__(self, seconds: float = QUIET_SECONDS, nowhere: float = NOWHERE_SECONDS) -> None:
        self._seconds, self._nowhere = seconds, nowhere
        self._limit: float | None = None  # for which looks like the last one have to go on
        self._since = 0.0  # when they began

    def look(self, open_requests: int | None, now: float, reachable: bool = True) -> bool:
        limit = None
        if open_requests == 0:
            limit = self._seconds
        elif open_requests is None and not reachable:
            limit = self._nowhere
        if limit != self._limit:
            self._limit, self._since = limit, now
        return limit is not None and now - self._since >= limit
