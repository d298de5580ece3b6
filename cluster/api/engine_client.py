"""What the front door needs of an engine, wherever it runs: behind Ray actors (cluster/routing/shard_client.py) or in
this process (cluster/local/engine.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.requests import Delta, GenerationRequest


class EngineUnavailableError(IsothermError):
    """No shard can take the request now: HTTP 503 with Retry-After."""


class EngineOverloadedError(EngineUnavailableError):
    """There are as many requests as there may be: HTTP 429 with Retry-After."""


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

    def capacity(self) -> int:
        """Requests that may be open at once, running or waiting; one more would be refused."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """The request's deltas, the last with a finish reason. Closing the iterator early (`aclose`) aborts the request
        and frees its KV cache. Raises EngineUnavailableError, or EngineOverloadedError, before the first delta."""

    async def status(self) -> JSON:
        """What `isotherm status --json` prints."""
