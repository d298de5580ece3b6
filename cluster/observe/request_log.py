"""A line in the log for each request that has ended: who asked, how it ended, where its time went. Nothing that was
said in it."""

from __future__ import annotations

import logging

from isotherm.cluster.api.request_book import RequestRecord
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.logs import FIELDS

logger = logging.getLogger("isotherm.request")
_SECONDS = ("prepare", "queue", "prefill", "decode", "first_token", "seconds", "group_wait")
_COUNTS = ("choices", "prompt_tokens", "cached_tokens", "output_tokens", "moved", "resumed", "preempted")


def log_request(record: RequestRecord) -> None:
    """A sink of the request book. A request that failed by our fault is a warning."""
    level = logging.WARNING if record.status >= 500 or (record.status == 200 and record.error) else logging.INFO
    if logger.isEnabledFor(level):
        logger.log(level, "ended", extra={FIELDS: fields_of(record)})


def fields_of(record: RequestRecord) -> JSON:
    """Times in milliseconds."""
    of = vars(record)
    times = {f"{name}_ms": _milliseconds(of[name]) for name in _SECONDS}
    return {
        "request": record.id,
        "reply": record.reply,
        "key": record.key,
        "route": record.route,
        "model": record.model,
        "status": record.status,
        "error_type": record.error,
        "stream": record.stream,
        "finish": list(record.finish_reasons),
        **{name: of[name] for name in _COUNTS},
        **times,
        "trace": "" if record.trace is None else record.trace.trace,
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)
