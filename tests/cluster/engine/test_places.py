"""Who may have one more place: bounds by requests and tokens, bands of priority, shares of keys."""

from __future__ import annotations

import random

import pytest

from isotherm.cluster.engine.places import (
    Band,
    Claim,
    OutputLengths,
    Places,
    QueueFullError,
    Room,
    ShardPlaces,
    band_of,
)
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams

ROOM = Room(16)


def request(name: str, tokens: int = 10, prompt: int = 10, **fields: object) -> GenerationRequest:
    return GenerationRequest(name, tuple(range(prompt)), SamplingParams(tokens), **fields)  # type: ignore[arg-type]


def filled(places: Places, claim: Claim, room: Room, most: int = 1000) -> int:
    """How many come in, one by one."""
    for count in range(most):
        if places.refusal(claim, 1, room) is not None:
            return count
        places.take(claim, 1)
    return most


def test_without_keys_everybody_has_every_place():
    places = Places()
    assert filled(places, Claim(), ROOM) == 16
    assert places.refusal(Claim(), 1, ROOM) == "16 requests are running or waiting, and 16 may"
    places.give_back(Claim(), 3)
    assert places.refusal(Claim(), 3, ROOM) is None and places.refusal(Claim(), 4, ROOM) is not None


def test_background_work_keeps_nobody_out_and_is_kept_out_by_all():
    places = Places()
    background, normal, urgent = (Claim(band=band) for band in reversed(Band))
    assert [band_of(p) for p in (-5, -1, 0, 1, 10**6)] == [0, 0, 1, 2, 2]
    assert [filled(places, one, ROOM) for one in (background, normal, urgent)] == [16, 16, 16]
    assert [filled(places, one, ROOM) for one in (background, normal, urgent)] == [0, 0, 0]
    assert places.requests == 48
    places.give_back(normal, 16)
    assert filled(places, background, ROOM) == 0, "the urgent ones have them"


def test_tokens_are_a_bound_too_and_one_request_may_have_more_than_all():
    places, room = Places(), Room(16, tokens=1000)
    assert places.refusal(Claim(), 1, room) is None
    places.take(Claim(), 1, 5000)
    assert "have 5000 tokens, and 1000 fit" in (places.refusal(Claim(), 1, room) or "")
    places.give_back(Claim(), 1, 5000)
    places.take(Claim(band=Band.BACKGROUND), 1, 5000)
    assert places.refusal(Claim(), 1, room) is None


def test_a_key_that_floods_leaves_room_for_others():
    places = Places()
    assert filled(places, Claim("a"), ROOM) == 14, "an eighth is kept"
    assert filled(places, Claim("b"), ROOM) == 2
    reason = places.refusal(Claim("a"), 1, ROOM)
    assert reason == "16 requests are running or waiting, and 16 may"
    places.give_back(Claim("a"), 1)
    reason = places.refusal(Claim("a"), 1, ROOM)
    assert reason == (
        "13 requests of this key are running or waiting, and its share of the 16 places is 7 while others ask too"
    )
    assert places.refusal(Claim("b"), 1, ROOM) is None
    assert places.refusal(Claim("c"), 1, ROOM) is None, "one that comes for the first time"


def test_places_that_others_leave_free_are_anybodys():
    places = Places()
    places.take(Claim("b"), 2)
    assert filled(places, Claim("a"), ROOM) == 12


@pytest.mark.parametrize(("weights", "expected"), [((3.0, 1.0), (168, 56)), ((1.0, 1.0), (112, 112))])
def test_two_keys_that_both_flood_get_places_by_weight(weights, expected):
    """Each place that is left is fought for; whoever was first, the shares are soon as they should be."""
    places, room, rng = Places(), Room(256), random.Random(1)
    claims = [Claim(name, weight) for name, weight in zip("ab", weights, strict=True)]
    held = [0, filled(places, claims[1], room)]
    for _ in range(5000):
        leaving = rng.choices((0, 1), held)[0]
        places.give_back(claims[leaving], 1)
        held[leaving] -= 1
        for coming in rng.choices((0, 1), k=6):
            if places.refusal(claims[coming], 1, room) is None:
                places.take(claims[coming], 1)
                held[coming] += 1
    assert held == pytest.approx(expected, abs=2)


def test_a_key_of_little_weight_is_not_shut_out():
    places = Places()
    filled(places, Claim("a", 1000.0), ROOM)
    assert filled(places, Claim("b", 0.001), ROOM) == 1


def test_a_key_with_long_requests_leaves_room_for_others():
    places, room = Places(), Room(1000, tokens=8000)
    places.take(Claim("a"), 3, 7500)
    assert places.refusal(Claim("a"), 1, room) is not None and places.refusal(Claim("b"), 1, room) is None


def test_an_output_is_expected_to_be_twice_as_long_as_those_before():
    lengths = OutputLengths()
    assert lengths.expected(4000) == 4000
    lengths.ended(100)
    assert (lengths.expected(4000), lengths.expected(50)) == (200, 50)
    for _ in range(200):
        lengths.ended(10)
    assert 20 <= lengths.expected(4000) <= 22


def test_a_shard_takes_those_that_a_shard_had_before_and_families_as_one():
    places = ShardPlaces(Room(3))
    members = [request(f"f{i}", family="f") for i in range(4)]
    tokens = [places.enter(one) for one in members]
    assert tokens == [20, 10, 10, 10], "the prompt is computed once"
    with pytest.raises(QueueFullError, match="at this shard 4 requests are running or waiting, and 3 may"):
        places.enter(request("a"))
    places.enter(request("b").resumed(()))
    places.enter(request("c", priority=-1))
    for one, of_one in zip(members, tokens, strict=True):
        places.leave(one, of_one)
    places.enter(request("a"))


def test_a_shard_knows_whether_background_work_is_beside_others():
    places = ShardPlaces(Room(8))
    row = request("row", priority=100)
    for one, shared in ((row, False), (request("a"), True)):
        places.enter(one)
        assert places.has_background_and_others == shared
    places.leave(row, 20)
    assert not places.has_background_and_others
