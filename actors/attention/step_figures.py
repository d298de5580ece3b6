"""What a shard's steps were like: fixed buckets that the stepping thread adds to, a microsecond or two for a step, and
others read now and then."""

from __future__ import annotations

from collections.abc import Sequence

from isotherm.cluster.engine.scheduler import Scheduler
from isotherm.cluster.engine.sequence import Chunk
from isotherm.cluster.engine.speculation import Speculation
from isotherm.cluster.messages.figures import Buckets, Family, Histogram, Metric

_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192)
_POWERS = tuple(float(1 << i) for i in range(14))  # 1 … 8192
STEP_SECONDS = Metric("isotherm_step_seconds", "Seconds of a step", "histogram", bounds=_SECONDS)
STEP_REQUESTS = Metric("isotherm_step_requests", "Requests that a step computed", "histogram", bounds=_POWERS[:11])
STEP_TOKENS = Metric("isotherm_step_tokens", "Tokens that a step computed", "histogram", bounds=_POWERS)
EXCHANGE_WAIT = Metric(
    "isotherm_step_exchange_wait_seconds",
    "Seconds of a step in which the shard could only wait for expert groups",
    "histogram",
    bounds=_SECONDS,
)
PREEMPTIONS = Metric("isotherm_preemptions_total", "Times that a request gave up its place, to be recomputed")
LOOKUPS = Metric(
    "isotherm_prefix_cache_lookup_tokens_total", "Prompt tokens that were looked up in the prefix cache, once a request"
)
HITS = Metric("isotherm_prefix_cache_hit_tokens_total", "Prompt tokens that were found in the prefix cache")
DRAFTED = Metric("isotherm_drafts_total", "Tokens that speculation guessed and a step verified")
ACCEPTED = Metric("isotherm_drafts_accepted_total", "Guessed tokens that were right")
GAIN = Metric(
    "isotherm_speculation_gain", "Speed that speculation expects / the one without it, as decided last", "gauge"
)
METRICS = (
    STEP_SECONDS, STEP_REQUESTS, STEP_TOKENS, EXCHANGE_WAIT, PREEMPTIONS, LOOKUPS, HITS, DRAFTED, ACCEPTED, GAIN
)  # fmt: skip


class StepFigures:
    """Written by the stepping thread alone."""

    def __init__(self) -> None:
        self._seconds, self._waits = Histogram(_SECONDS), Histogram(_SECONDS)
        self._requests, self._tokens = Histogram(STEP_REQUESTS.bounds), Histogram(STEP_TOKENS.bounds)

    def add(self, chunks: Sequence[Chunk], seconds: float, waited: float) -> None:
        """A step has computed `chunks`; of its seconds, so many were a wait for expert groups."""
        self._seconds.add(seconds)
        self._waits.add(waited)
        self._requests.add(len(chunks))
        self._tokens.add(sum([chunk.count for chunk in chunks]))

    def read(self, scheduler: Scheduler, speculation: Speculation | None = None) -> list[Family]:
        """As they are now, with the counts of the scheduler and of speculation; from any thread."""
        meter = None if speculation is None else speculation.meter()
        values: dict[Metric, float | Buckets] = {
            STEP_SECONDS: self._seconds.read(),
            STEP_REQUESTS: self._requests.read(),
            STEP_TOKENS: self._tokens.read(),
            EXCHANGE_WAIT: self._waits.read(),
            PREEMPTIONS: scheduler.preemptions,
            LOOKUPS: scheduler.looked_up,
            HITS: scheduler.found,
            DRAFTED: 0 if meter is None else meter.drafted,
            ACCEPTED: 0 if meter is None else sum(meter.accepted),
            GAIN: 1.0 if meter is None else meter.gain,
        }
        return [Family(metric, {(): value}) for metric, value in values.items()]
