"""Limits and defaults of the front door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isotherm.cluster.api.access.key_store import KeyStore
from isotherm.cluster.api.access.reach import Access


@dataclass(frozen=True)
class AppSettings:
    """Limits of the front door."""

    max_body_bytes: int = 8 << 20
    max_prompt_chars_per_token: int = 16  # × max_model_len: more characters than that are refused before tokenising
    retry_after_s: int = 1  # with a 503
    first_event_s: float = 0.2  # a stream's status line waits so long for its first event: a refusal is still a status
    access: Access = field(default_factory=Access)  # where there are no keys
    keys: KeyStore | None = None  # None: nobody is asked for one
    # What bodies that do not say are taken to ask for, by the names of SamplingParams; `max_tokens` among them
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tool_format: str = "auto"  # how the model calls tools, by the names of cluster/text/tool_formats/registry.py
    silence_s: float = 5.0  # after so long without an event a stream has a comment
    cors: tuple[str, ...] = ()  # origins whose pages may read answers; "*": all
    batches_refused: str = ""  # why this server takes no files and batches, where it takes none
    kept_response_bytes: int = 64 << 20  # of responses that later requests may go on from; others leave first
    request_timeout_s: float | None = None  # from a request's arrival to its end; clients may ask for fewer
    shared_prefix_cache: bool = False  # one for all keys

    @property
    def retry_after(self) -> dict[str, str]:
        """The header of that name."""
        return {"retry-after": str(self.retry_after_s)}
