from __future__ import annotations

from urllib.parse import urlencode

import pytest
from starlette.requests import Request

from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.pages import newest_first, page

ITEMS = [{"id": name} for name in "abcde"]


def asked(**query):
    return Request({"type": "http", "query_string": urlencode(query).encode(), "headers": []})


def ids(**query):
    found = page(ITEMS, asked(**query), 2, 4)
    return "".join(item["id"] for item in found["data"]), found["has_more"]


def test_pages_go_on_behind_what_is_named():
    assert ids() == ("ab", True) and ids(limit=4) == ("abcd", True)
    assert ids(after="c") == ("de", False) and ids(after="b", limit="0003") == ("cde", False)
    found = page(ITEMS, asked(after="e"), 2, 4)
    assert found == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert (page(ITEMS, asked(), 2, 4)["first_id"], page(ITEMS, asked(), 2, 4)["last_id"]) == ("a", "b")


@pytest.mark.parametrize("limit", ["0", "5", "-1", "x", "", "٣", "0000000019", "1".zfill(9) + "0" * 5000, "1" * 5000])
def test_limits_that_are_none_are_refused(limit):
    with pytest.raises(ReplyError, match="limit: expected 1 to 4") as info:
        page(ITEMS, asked(limit=limit), 2, 4)
    assert info.value.param == "limit"


def test_what_is_not_in_the_list_is_refused():
    with pytest.raises(ReplyError, match="after: 'z' is not in this list"):
        page(ITEMS, asked(after="z"), 2, 4)


def test_the_order():
    assert newest_first(asked()) and newest_first(asked(order="desc")) and not newest_first(asked(order="asc"))
    with pytest.raises(ReplyError, match="order: expected 'asc' or 'desc', got 'up'"):
        newest_first(asked(order="up"))
