"""What the front door needs of an engine, wherever it runs: behind Ray actors (cluster/routing/shard_client.py) or in
this process (cluster/local/engine.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest


class EngineUnavailableError(IsothermError):
    """No shard can take the request now: HTTP 503 with Retry-After."""


class EngineOverloadedError(EngineUnavailableError):
    """There are as many requests as there may be: HTTP 429 with Retry-After."""


HELD_UP_SECONDS = 1.5  # without a sign that requests get on, after which they are held up
MOST_UNREAD = 4096  # deltas of one request that wait for their reader; with more of them it ends
TOO_SLOW = f"its client reads too slowly: {MOST_UNREAD} pieces of its output wait for it"


def hand_over(delta: Delta, unread: asyncio.Queue[Delta]) -> bool:
    """Leave a delta to the reader of its request. False where too many wait for him: they are thrown away, he is told
    TOO_SLOW, and whoever calls has to end the request."""
    if unread.qsize() < MOST_UNREAD or delta.finish_reason is not None:
        unread.put_nowait(delta)
        return True
    while not unread.empty():
        unread.get_nowait()
    unread.put_nowait(Delta(delta.request_id, 0, finish_reason=FinishReason.ERROR, error=TOO_SLOW))
    return False


class EngineClient(Protocol):
    """Takes requests and gives back their tokens."""

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens together, at most."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def system_fingerprint(self) -> str:
        """What decides a reply's bits beside prompt, parameters and seed; empty while it is not known."""

    def not_ready(self) -> str | None:
        """None when requests can be served, else why not ("loading: 2 of 3 workers")."""

    async def held_up(self) -> str | None:
        """None when a request would get on: whatever its rows need has shown within HELD_UP_SECONDS that it goes on.
        Else why not."""

    def capacity(self) -> int:
        """Requests that may be open at once, running or waiting; one more would be refused."""

    def token_capacity(self) -> int:
        """Tokens that the open requests may have, of prompts and of outputs as long as they are expected to be; once
        they have as many, one more request would be refused."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """The request's deltas, the last with a finish reason. A reader that leaves MOST_UNREAD of them waiting is told
        TOO_SLOW. Closing the iterator early (`aclose`) aborts the request and frees its KV cache. Raises
        EngineUnavailableError, or EngineOverloadedError, before the first delta."""

    async def status(self) -> JSON:
        """What `isotherm status --json` prints."""
