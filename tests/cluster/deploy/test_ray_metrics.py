"""What Ray is shown of the cluster's metrics."""

from __future__ import annotations

from isotherm.cluster.deploy.ray_metrics import RayMirror
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
        (("key", "a"), ("shard", "one")): 3, (("key", "a"), ("shard", "two")): 3,
    }  # fmt: skip
    assert Gauge.all["s_seconds_bucket"][(("le", "0.5"), ("shard", "one"))] == 1  # type: ignore[attr-defined]
    assert Gauge.all["s_seconds_sum"][(("shard", "one"),)] == 0.4  # type: ignore[attr-defined]
    made = list(Gauge.made)
    mirror.show(families_of("shard", {"one": tally.read()}))
    assert Gauge.all["c_total"][(("key", "a"), ("shard", "two"))] == 0  # type: ignore[attr-defined]
    assert Gauge.all["c_total"][(("key", "a"), ("shard", "one"))] == 3  # type: ignore[attr-defined]
    assert Gauge.made == made, "each is made once: Ray keeps them"


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
