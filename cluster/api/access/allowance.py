"""What one key may still take now: its requests and tokens of this minute, and its streams. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from isotherm.cluster.api.access.caller import KeyLimits

_MINUTE = 60.0
_ROUNDING = 1e-6  # seconds that are none


class Bucket:
    """Holds what a minute allows, and fills evenly. What is taken beyond it is owed: there is nothing more until that
    has come in."""

    def __init__(self, per_minute: float) -> None:
        self.size = self._level = per_minute
        self._at = 0.0  # of the level, in seconds

    def resize(self, per_minute: float) -> None:
        """What was taken stays taken."""
        self._level += per_minute - self.size
        self.size = per_minute

    def level(self, now: float) -> float:
        self._level = min(self.size, self._level + max(0.0, now - self._at) * self.size / _MINUTE)
        self._at = max(now, self._at)
        return self._level

    def take(self, amount: float, now: float) -> None:
        self.level(now)
        self._level -= amount

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much is there; of more than the bucket holds, until it is full."""
        seconds = (min(amount, self.size) - self.level(now)) * _MINUTE / self.size
        return seconds if seconds > _ROUNDING else 0.0

    def headers(self, what: str, now: float) -> dict[str, str]:
        """OpenAI's, for `requests` or `tokens`."""
        level = self.level(now)
        return {
            f"x-ratelimit-limit-{what}": str(math.floor(self.size)),
            f"x-ratelimit-remaining-{what}": str(max(0, math.floor(level))),
            f"x-ratelimit-reset-{what}": duration((self.size - level) * _MINUTE / self.size),
        }


def duration(seconds: float) -> str:
    """As OpenAI's headers say it: 12ms, 7.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{minutes:.0f}m{rest:g}s" if minutes else f"{rest:g}s"


@dataclass(frozen=True)
class Refusal:
    """`what` the key has used up, and the seconds after which to come again."""

    what: str
    retry_after: float


def share(limits: KeyLimits, replicas: int) -> KeyLimits:
    """What one of several ingress replicas, over which a key's requests are spread, lets it take."""

    def part(value: int | None) -> int | None:
        return None if value is None else -(-value // replicas)

    requests, tokens = part(limits.requests_per_minute), part(limits.tokens_per_minute)
    return replace(limits, requests_per_minute=requests, tokens_per_minute=tokens, streams=part(limits.streams))


class Allowance:
    """Of one key, at one ingress replica. Times are seconds on one clock."""

    def __init__(self, limits: KeyLimits) -> None:
        self.streams = 0  # open
        self._limits = KeyLimits()
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.change(limits)

    def change(self, limits: KeyLimits) -> None:
        self._limits = limits
        self._requests = _resized(self._requests, limits.requests_per_minute)
        self._tokens = _resized(self._tokens, limits.tokens_per_minute)

    @property
    def counts(self) -> bool:
        """Whether there is anything to count."""
        return self._requests is not None or self._tokens is not None or self._limits.streams is not None

    @property
    def counts_tokens(self) -> bool:
        return self._tokens is not None

    def request(self, now: float) -> Refusal | None:
        """One more request; None where it is let in, which is then counted."""
        if self._tokens is not None and self._tokens.level(now) <= 0:
            return Refusal("tokens_per_minute", self._tokens.wait(1, now))
        if self._requests is not None:
            if (seconds := self._requests.wait(1, now)) > 0:
                return Refusal("requests_per_minute", seconds)
            self._requests.take(1, now)
        return None

    def generation(self, prompt_tokens: int, streams: int, now: float) -> Refusal | None:
        """So many streams with so many tokens of prompts in all; None where they are let in. Their outputs are counted
        as they come (`used`), and may leave a debt."""
        most = self._limits.streams
        if most is not None and self.streams + streams > most and self.streams:
            return Refusal("streams", 1.0)
        if self._tokens is not None:
            if (seconds := self._tokens.wait(prompt_tokens, now)) > 0:
                return Refusal("tokens_per_minute", seconds)
            self._tokens.take(prompt_tokens, now)
        self.streams += streams
        return None

    def ended(self, streams: int) -> None:
        self.streams -= streams

    def used(self, tokens: int, now: float) -> None:
        """So many tokens more of an output."""
        if self._tokens is not None:
            self._tokens.take(tokens, now)

    def headers(self, now: float) -> dict[str, str]:
        """What is left, for the client to see."""
        found: dict[str, str] = {}
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found |= bucket.headers(what, now)
        return found


def _resized(bucket: Bucket | None, per_minute: int | None) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute)
    bucket.resize(per_minute)
    return bucket
