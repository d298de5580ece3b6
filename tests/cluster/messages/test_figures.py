"""Counters and histograms: where a value falls, and how many series there can be."""

from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from isotherm.cluster.messages.figures import OTHER, BoundedLabels, Buckets, Histogram, Metric, Tally

BOUNDS = (0.5, 1.0, 4.0)
COUNT = Metric("c_total", "count")
BY_KEY = Metric("k_total", "by key", labels=("key",))
SIZES = Metric("s", "sizes", "histogram", ("key",), BOUNDS)


@given(st.lists(st.floats(0, 10)))
def test_a_value_falls_into_the_first_bucket_whose_end_it_does_not_exceed(values):
    histogram = Histogram(BOUNDS)
    for value in values:
        histogram.add(value)
    ends = (*BOUNDS, float("inf"))
    begins = (-1.0, *BOUNDS)
    expected = tuple(sum(low < v <= high for v in values) for low, high in zip(begins, ends, strict=True))
    assert histogram.read() == Buckets(expected, sum(values)) and histogram.read().count == len(values)


def test_a_tally_is_read_in_the_order_of_its_metrics_and_can_be_sent():
    tally = Tally([SIZES, COUNT, BY_KEY])
    tally.add(COUNT)
    tally.add(BY_KEY, ("a",), 2)
    tally.add(BY_KEY, ("a",))
    tally.observe(SIZES, 1.0, ("a",))
    sizes, count, by_key = pickle.loads(pickle.dumps(tally.read()))
    assert (sizes.metric, count.metric, by_key.metric) == (SIZES, COUNT, BY_KEY)
    assert sizes.values == {("a",): Buckets((0, 1, 0, 0), 1.0)}
    assert count.values == {(): 1.0} and by_key.values == {("a",): 3.0}


def test_what_was_read_does_not_change():
    tally = Tally([SIZES, BY_KEY])
    tally.observe(SIZES, 1.0, ("a",))
    before = tally.read()
    tally.observe(SIZES, 1.0, ("a",))
    tally.add(BY_KEY, ("a",))
    assert before[0].values == {("a",): Buckets((0, 1, 0, 0), 1.0)} and before[1].values == {}


def test_metrics_without_labels_are_there_from_the_start():
    first = Metric("h", "h", "histogram", bounds=BOUNDS)
    assert [family.values for family in Tally([COUNT, first]).read()] == [{(): 0.0}, {(): Buckets((0,) * 4, 0.0)}]


def test_the_number_of_values_of_a_label_is_bounded():
    labels = BoundedLabels(2)
    assert [labels.of(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", OTHER, "a", OTHER]
