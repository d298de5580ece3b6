"""What `isotherm top` shows, as it comes: by the event stream, and by asking again and again where that cannot be
read."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from isotherm.cluster.client import APIError, Client, ConnectionFailedError
from isotherm.cluster.jsontypes import JSON

ASKED = 30  # looks by asking, after which the event stream is tried again
_KEY_IS_WRONG = 401, 403


@dataclass(frozen=True)
class Sample:
    """What was known at one moment. `autoscaler` is None where the server has none. `note`: why it was asked for,
    rather than told by the event stream."""

    time: float  # seconds, of any clock
    status: JSON
    experts: JSON
    autoscaler: JSON | None
    note: str = ""


def looks(client: Client, interval: float, sleep: Callable[[float], None] = time.sleep) -> Generator[Sample | str]:
    """The cluster after each change, for ever, or why nothing new comes at present. Where the event stream is refused
    the server is asked, every `interval` seconds. Raises ConnectionFailedError where nothing answers at first, and
    APIError where what answers is not Isotherm or the API key may not look."""
    seen = False
    while True:
        try:
            for found in _turn(client, interval, sleep):
                seen = True
                yield found
        except (ConnectionFailedError, APIError) as error:
            if not seen:
                raise
            yield str(error)
            sleep(interval)


def _turn(client: Client, interval: float, sleep: Callable[[float], None]) -> Iterator[Sample | str]:
    """The event stream while it lasts; else a number of looks."""
    try:
        yield from _told(client)
    except APIError as error:
        if error.status in _KEY_IS_WRONG:
            raise
        note = f"asking every {interval:g} s; the event stream cannot be read: {error}"
    for _ in range(ASKED):
        yield _asked(client, note)
        sleep(interval)


def _told(client: Client) -> Iterator[Sample | str]:
    for state in client.feed():
        if state.trouble and not state.values:
            raise APIError(200, "what came was no event stream")
        if state.trouble:
            yield state.trouble
        elif "cluster" in state.values:
            yield Sample(time.monotonic(), state.status(), state.experts(), state.autoscaler())


def _asked(client: Client, note: str) -> Sample:
    try:
        autoscaler = client.autoscaler()
    except APIError as error:
        if error.status != 404:
            raise
        autoscaler = None
    return Sample(time.monotonic(), client.status(), client.experts(), autoscaler, note)
