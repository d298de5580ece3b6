"""What Ray is shown of the cluster's metrics."""

from __future__ import annotations

from isotherm.cluster.deploy.ray_metrics import Numbers, RayMirror
from isotherm.cluster.messages.figures import Metric, Tally
from isotherm.cluster.observe.exposition import families_of

COUNT = Metric("c_total", "How many", labels=("key",))
SIZES = Metric("s_seconds", "How long", "histogram", bounds=(0.5,))


class Gauge:
    made: list

    def __init__(self, name, words, labels):
        self.name, self.values = name, {}
        Gauge.made.append((name, labels))
        Gauge.all[name] = self.values

    def set(self, value, tags=None):
        self.values[tuple(sorted((tags or {}).items()))] = value


def test_every_sample_is_a_gauge_and_what_is_gone_goes_to_zero():
    Gauge.made, Gauge.all = [], {}  # type: ignore[attr-defined]
    mirror = RayMirror(Gauge)
    tally = Tally([COUNT, SIZES])
    tally.add(COUNT, ("a",), 3)
    tally.observe(SIZES, 0.4)
    mirror.show(families_of("shard", {"one": tally.read(), "two": tally.read()}))
    assert Gauge.all["c_total"] == {  # type: ignore[attr-defined]
        (("key", "a"), ("shard", "0")): 3, (("key", "a"), ("shard", "1")): 3,
    }  # fmt: skip
    assert Gauge.all["s_seconds_bucket"][(("le", "0.5"), ("shard", "0"))] == 1  # type: ignore[attr-defined]
    assert Gauge.all["s_seconds_sum"][(("shard", "0"),)] == 0.4  # type: ignore[attr-defined]
    made = list(Gauge.made)
    mirror.show(families_of("shard", {"one": tally.read()}))
    assert Gauge.all["c_total"][(("key", "a"), ("shard", "1"))] == 0  # type: ignore[attr-defined]
    assert Gauge.all["c_total"][(("key", "a"), ("shard", "0"))] == 3  # type: ignore[attr-defined]
    assert Gauge.made == made, "each is made once: Ray keeps them"


def test_processes_that_come_and_go_leave_no_more_series_than_were_there_at_once():
    Gauge.made, Gauge.all = [], {}  # type: ignore[attr-defined]
    mirror = RayMirror(Gauge)
    for i in range(50):
        tally = Tally([COUNT])
        tally.add(COUNT, ("a",), i)
        mirror.show(families_of("ingress", {f"replica-{i}": tally.read(), f"replica-{i + 1}": tally.read()}))
    assert Gauge.all["c_total"] == {  # type: ignore[attr-defined]
        (("ingress", "0"), ("key", "a")): 49, (("ingress", "1"), ("key", "a")): 49,
    }  # fmt: skip


def test_who_stays_keeps_its_number_and_the_least_free_one_is_given():
    numbers = Numbers()
    numbers.keep({"a", "b", "c"})
    assert [numbers.of(name) for name in "abc"] == ["0", "1", "2"]
    numbers.keep({"c", "d"})
    assert [numbers.of(name) for name in "cd"] == ["2", "0"]
    numbers.keep({"c", "d", "e", "f"})
    assert [numbers.of(name) for name in "cdef"] == ["2", "0", "1", "3"]


def test_ray_is_told_nothing_but_ascii_which_is_all_that_it_takes():
    told: list[str] = []

    class Strict:
        def __init__(self, name, words, labels):
            told.extend([name, words, *labels])

        def set(self, value, tags=None):
            told.extend(tags.values())

    tally = Tally([Metric("d_total", "Speed ÷ speed", labels=("key",))])
    for key in ("zoë", "zo\u0308", "zoe"):
        tally.add(Metric("d_total", "Speed ÷ speed", labels=("key",)), (key,), 1)
    RayMirror(Strict).show(families_of("shard", {"one": tally.read()}))
    assert all(text.isascii() for text in told), told
    assert len({text for text in told if text.startswith("zo")}) == 3, "three keys stay three"
