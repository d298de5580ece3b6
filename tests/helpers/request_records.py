"""Request records for tests."""

from __future__ import annotations

from typing import Any

from isotherm.cluster.api.request_book import RequestRecord

RECORD = RequestRecord(
    id="req-1",
    reply="chatcmpl-1",
    key="alice",
    route="/v1/chat/completions",
    model="tiny",
    state="ended",
    status=200,
    error="",
    stream=True,
    choices=1,
    prompt_tokens=20,
    cached_tokens=16,
    output_tokens=11,
    finish_reasons=("stop",),
    started=1_000_000.0,
    prepare=0.01,
    queue=0.2,
    prefill=0.3,
    decode=1.0,
    first_token=0.51,
    seconds=1.51,
)


def record(**fields: Any) -> RequestRecord:
    """One that went well, but for what is given."""
    return RequestRecord(**(RECORD.__dict__ | fields))
