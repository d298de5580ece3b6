"""A batch as OpenAI's API shows it, and how its status goes on. Pure."""

from __future__ import annotations

from typing import Any

from isotherm.cluster.api.batches.rows import Fault
from isotherm.cluster.jsontypes import JSON

FINAL = frozenset({"failed", "completed", "expired", "cancelled"})
_TIMES = (
    "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at",
    "cancelled_at",
)  # fmt: skip

_HIDDEN = ("output_expires_after", "then", "owner")


def new_batch(
    batch_id: str,
    endpoint: str,
    input_file_id: str,
    window: str,
    metadata: JSON | None,
    keep: int | None,
    now: float,
    owner: str = "",
) -> JSON:
    """A batch that nobody has looked at yet. `keep`: seconds that its output is kept, where its client says. `owner`:
    the name of the key that it belongs to."""
    return {
        "id": batch_id,
        "object": "batch",
        "endpoint": endpoint,
        "errors": None,
        "input_file_id": input_file_id,
        "completion_window": window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": int(now),
        **dict.fromkeys(_TIMES),
        "expires_at": int(now) + window_seconds(window),
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": None,
        "metadata": metadata,
        "output_expires_after": keep,
        "then": None,  # the final status of a batch that is `finalizing`
        "owner": owner,
    }


def moved(batch: JSON, status: str, now: float, **fields: Any) -> JSON:
    """The batch with a new status, since `now`."""
    return {**batch, "status": status, f"{status}_at": int(now), **fields}


def shown(batch: JSON, cancelling_at: float | None, waits: Fault | None = None) -> JSON:
    """What a client sees: a batch whose cancelling was asked for is `cancelling` until whoever runs it has ended it,
    and one that is not over has what it `waits` for among its errors."""
    seen = {key: value for key, value in batch.items() if key not in _HIDDEN}
    if waits is not None and batch["status"] not in FINAL:
        before = (batch["errors"] or {}).get("data", [])
        seen["errors"] = {"object": "list", "data": [*before, waits.as_json()]}
    if cancelling_at is None:
        return seen
    status = batch["status"] if batch["status"] in FINAL else "cancelling"
    return {**seen, "status": status, "cancelling_at": int(cancelling_at)}


def window_seconds(window: str) -> int:
    """24h → 86400. Raises ValueError where it is no number of hours from 1 to 168, or of minutes."""
    number, unit = window[:-1], window[-1:]
    scale = {"h": 3600, "m": 60}.get(unit)
    if scale is None or not (number.isascii() and number.isdecimal() and len(number) <= 9):
        raise ValueError(window)
    if not 0 < int(number) * scale <= 168 * 3600:
        raise ValueError(window)
    return int(number) * scale
