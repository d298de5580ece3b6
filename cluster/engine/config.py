"""The limits within which an attention shard's scheduler works."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from isotherm.cluster.engine.places import Room
from isotherm.cluster.messages.membership import ShardLimits


@dataclass(frozen=True)
class SchedulerConfig:
    block_size: int  # tokens per KV block
    blocks: int
    max_batch_tokens: int  # tokens per step, all requests together
    max_sequences: int  # requests that hold KV blocks at once
    max_model_len: int  # prompt and output of one request
    prefix_cache: bool = True
    max_waiting: int | None = None  # requests beyond max_sequences; None: any number
    max_waiting_tokens: int | None = None  # tokens beyond what the blocks hold; None: any number

    def __post_init__(self) -> None:
        for name in ("block_size", "blocks", "max_batch_tokens", "max_sequences", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_model_len > self.kv_tokens:
            raise ValueError(
                f"max_model_len {self.max_model_len} does not fit into {self.blocks} KV blocks of {self.block_size} "
                "tokens"
            )

    @property
    def kv_tokens(self) -> int:
        return self.blocks * self.block_size

    @property
    def room(self) -> Room:
        """What may be here at once, running and waiting."""
        requests, tokens = self.max_waiting, self.max_waiting_tokens
        return Room(
            sys.maxsize if requests is None else self.max_sequences + requests,
            sys.maxsize if tokens is None else self.kv_tokens + tokens,
        )

    @property
    def limits(self) -> ShardLimits:
        """The same as ingress replicas are told of it."""
        return ShardLimits(self.max_model_len, self.max_sequences, self.room.requests, self.room.tokens)
