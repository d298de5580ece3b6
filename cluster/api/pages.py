"""Pages of lists, in OpenAI's form, from what a request's query says."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request

from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.jsontypes import JSON


def newest_first(request: Request) -> bool:
    """Whether the list is to begin with the newest, as it does unless `order` says otherwise. Raises ReplyError."""
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise ReplyError(f"order: expected 'asc' or 'desc', got {order[:100]!r}", param="order")
    return order == "desc"


def page(items: Sequence[JSON], request: Request, default: int, most: int) -> JSON:
    """`limit` entries (`default` where the query does not say, at most `most`) behind the one that `after` names.
    Raises ReplyError."""
    text, after = request.query_params.get("limit", str(default)), request.query_params.get("after")
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= most):
        raise ReplyError(f"limit: expected 1 to {most}, got {text[:20]!r}", param="limit")
    begin = 0
    if after is not None:
        at = next((i for i, entry in enumerate(items) if entry["id"] == after), None)
        if at is None:
            raise ReplyError(f"after: {after[:100]!r} is not in this list", param="after")
        begin = at + 1
    data = list(items[begin : begin + int(text)])
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": begin + len(data) < len(items),
    }
