from __future__ import annotations

from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import httpx
import pytest

from isotherm.cluster.client import ConnectionFailedError
from isotherm.cluster.client.tries import Tries


def test_waits_grow_up_to_a_limit():
    tries = Tries("", 50)
    pauses = [tries.after_error(httpx.ReadError("reset")) for _ in range(40)]
    assert pauses[0] <= 0.25 and min(pauses[10:]) >= 15.0 and max(pauses) <= 30.0
    with pytest.raises(ConnectionFailedError, match="slow"):
        tries.after_error(httpx.ReadTimeout("slow"))


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7.0, 7.0),
        ("100", 30.0, 30.0),
        ("soon", 0.0, 0.25),
        ("", 0.0, 0.25),
        pytest.param(format_datetime(datetime.now(timezone.utc) + timedelta(days=1)), 30.0, 30.0, id="a time to come"),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0, 0.0),
    ],
)
def test_a_server_says_when_to_come_again(header, least, most):
    pause = Tries("", 1).after_response(httpx.Response(503, headers={"retry-after": header}))
    assert pause is not None and least <= pause <= most


def test_other_statuses_count():
    tries = Tries("", 1)
    assert all(tries.after_response(httpx.Response(status)) is None for status in (200, 400, 404, 500, 502))
    assert tries.after_response(httpx.Response(429)) is not None
    assert tries.after_response(httpx.Response(429)) is None  # the last try
