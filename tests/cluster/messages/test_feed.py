"""The event stream's table: that whoever follows it, however seldom, comes to know what there is."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from isotherm.cluster.messages import feed
from isotherm.cluster.messages.feed import FeedTable

CHANGES = st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), st.integers(0, 2)), st.booleans()))


@given(CHANGES)
def test_who_follows_knows_what_there_is(changes: list[tuple[str, int | None, bool]]):
    """With None a name is dropped; the flag says whether the listener asks then."""
    table, now, last = FeedTable("e"), {}, ""
    known: dict[str, Any] = {}
    for name, value, asks in [*changes, ("a", 7, True)]:
        if value is None:
            table.drop(name)
            now.pop(name, None)
        else:
            table.put(name, value)
            now[name] = value
        if asks and (part := table.since(last)) is not None:
            known = {} if part.snapshot else known
            for gone in part.gone:
                known.pop(gone, None)
            known |= part.values
            last = part.id
            assert known == now
    assert known == now and table.since(last) is None


def test_who_comes_from_elsewhere_is_told_all():
    table = FeedTable("e")
    table.put("a", 1)
    for last in ("", "e", "e:", "e:9", "e:-1", "e:x", "other:1", "e:" + "9" * 90, "\n", "e:²"):
        part = table.since(last)
        assert part is not None and part.snapshot and part.values == {"a": 1} and part.id == "e:1", last
    assert table.since("e:1") is None and part.event == "snapshot"


def test_what_is_the_same_is_no_change_and_prefixes_are_replaced():
    table = FeedTable("e")
    table.replace("w/", {"a": 1, "b": 2})
    table.put("other", 3)
    version = table.version
    table.replace("w/", {"a": 1, "b": 2})
    assert table.version == version
    table.replace("w/", {"b": 5})
    part = table.since(f"e:{version}")
    assert part is not None and part.as_dict() == {"set": {"w/b": 5}, "gone": ["w/a"]} and part.event == "change"
    assert "other" in table


def test_memory_is_bounded_and_whoever_was_away_too_long_is_told_all(monkeypatch):
    monkeypatch.setattr(feed, "TOMBSTONES", 3)
    table = FeedTable("e")
    for i in range(6):
        table.put(f"s/{i}", i)
        table.drop(f"s/{i}")
    table.put("a", 1)
    old, new = table.since("e:2"), table.since("e:8")
    assert old is not None and old.snapshot and old.values == {"a": 1}
    assert new is not None and not new.snapshot and set(new.gone) == {"s/4", "s/5"}
