"""W3C's trace context (https://www.w3.org/TR/trace-context/): whose trace a request belongs to, and what it hands
on."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

HEADER, STATE = "traceparent", "tracestate"
_PARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_LONGEST_STATE = 512  # characters, which the standard wants propagated


@dataclass(frozen=True)
class TraceContext:
    """Of one request's own span. `parent`: the span of who asked; empty where there is none."""

    trace: str  # 32 hexadecimal digits
    span: str  # 16
    parent: str = ""
    sampled: bool = True
    state: str = ""

    @property
    def header(self) -> str:
        """As `traceparent`."""
        return f"00-{self.trace}-{self.span}-{'01' if self.sampled else '00'}"


def begin(traceparent: str | None, tracestate: str | None, sample: float, random: Callable[[], float]) -> TraceContext:
    """The context of a request that came with these headers. Where it is part of a trace, that trace says whether it is
    recorded; of others the share `sample`."""
    span = secrets.token_hex(8)
    found = _PARENT.fullmatch(traceparent.strip()) if traceparent and len(traceparent) < 256 else None
    if found is None or (found[1] == "00" and found[5]):
        return TraceContext(secrets.token_hex(16), span, sampled=random() < sample)
    state = tracestate if tracestate and len(tracestate) <= _LONGEST_STATE else ""
    return TraceContext(found[2], span, found[3], bool(int(found[4], 16) & 1), state)
