from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotherm.cluster.autoscale.forecast import FORGET, LoadView, predict


def counts(*rows: int) -> np.ndarray:
    """One layer."""
    return np.array([rows], dtype=np.int64)


def seen(view: LoadView) -> int:
    """Rows of all windows, of the open one too."""
    return int(view.windows().sum() + view._open_LE.sum())


def test_a_steady_load_is_its_own_rate_from_the_first_seconds_on():
    view = LoadView(1, 2, half_life=10.0)
    for second in range(30):
        view.observe({"a": counts(100 * second, 0), "b": counts(50 * second, 20 * second)}, float(second))
        if second:
            assert view.rates(second) == pytest.approx(np.array([[150.0, 20.0]]))
    assert seen(view) == 29 * 170
    assert view.rates(39.0) == pytest.approx(np.array([[75.0, 10.0]])), "nobody reports: half after a half-life"


def test_what_is_older_counts_less():
    view = LoadView(1, 2, half_life=5.0)
    for second in range(101):
        view.observe({"a": counts(100 * min(second, 50), 100 * max(second - 50, 0))}, float(second))
    left, new = view.rates(100.0)[0]
    assert left == pytest.approx(100 * 0.5**10, rel=0.01) and left + new == pytest.approx(100.0)


def test_what_was_counted_before_the_view_began_is_not_of_now():
    view = LoadView(1, 1)
    assert not view.rates(0.0).any()
    view.observe({"a": counts(10**9)}, 0.0)
    view.observe({"a": counts(10**9 + 10)}, 1.0)
    assert seen(view) == 10 and view.rates(1.0)[0, 0] == pytest.approx(10.0)
    late = LoadView(1, 1)
    late.observe({}, 0.0)
    late.observe({"a": counts(10**9)}, 2.0)
    assert not late.rates(2.0).any(), "it missed the first look"


def test_new_restarted_silent_and_forgotten_shards():
    view = LoadView(1, 2)
    view.observe({"a": counts(100, 100)}, 0.0)
    view.observe({"a": counts(110, 100), "b": counts(5, 0)}, 1.0)
    assert seen(view) == 10, "what a new shard has counted before it is heard first is not of now"
    view.observe({"a": counts(3, 200), "b": counts(5, 1)}, 2.0)
    assert seen(view) == 10 + 203 + 1, "a counter that goes back is a fresh start of all"
    view.observe({"b": counts(5, 1)}, 3.0)
    view.observe({"a": counts(4, 200), "b": counts(5, 1)}, 4.0)
    assert seen(view) == 215, "a missed turn is no restart"
    view.observe({"b": counts(5, 1)}, 5.0 + FORGET)
    view.observe({"a": counts(7, 0), "b": counts(5, 1)}, 6.0 + FORGET)
    assert seen(view) == 215, "nor what one has that was forgotten"


def test_counters_are_not_aliased():
    view, counter = LoadView(1, 1), counts(0)
    view.observe({"a": counter}, 0.0)
    counter += 5
    view.observe({"a": counter}, 1.0)
    assert seen(view) == 5


def test_counters_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"a counts rows of shape \(1, 3\); the model's is \(1, 2\)"):
        LoadView(1, 2).observe({"a": counts(1, 2, 3)}, 0.0)
    with pytest.raises(ValueError, match="both must be positive"):
        LoadView(1, 2, window=0.0)


def test_windows_are_closed_ones_and_the_last_few():
    view = LoadView(1, 1, window=5.0, keep=3)
    for second in range(5):
        view.observe({"a": counts(second)}, float(second))
        assert view.windows().shape == (0, 1, 1)
    for second in range(5, 34):
        view.observe({"a": counts(second if second < 30 else 30)}, float(second))
    assert view.windows()[:, 0, 0].tolist() == [5.0, 5.0, 5.0]


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0.01, 30.0)), min_size=1, max_size=30))
def test_no_row_is_lost_or_counted_twice(steps):
    view, total, now = LoadView(1, 1, window=5.0, keep=100), 0, 0.0
    view.observe({"a": counts(0)}, 0.0)
    for rows, seconds in steps:
        total, now = total + rows, now + seconds
        view.observe({"a": counts(total)}, now)
    assert seen(view) == total
    view.observe({"a": counts(total)}, now + 5.0)
    assert view.windows().sum() == total


# --- prediction -----------------------------------------------------------------------------------


def drifting(windows: int, rows: float, drift: float, seed: int = 0) -> np.ndarray:
    """Expected rows [W, 2, 64], log loads taking AR(1) steps; each window-layer sums to `rows`."""
    random = np.random.default_rng(seed)
    log_LE = random.normal(size=(2, 64))
    out = []
    for _ in range(windows):
        out.append(np.exp(log_LE) / np.exp(log_LE).sum(axis=1, keepdims=True) * rows)
        log_LE = np.sqrt(1 - drift**2) * log_LE + drift * random.normal(size=log_LE.shape)
    return np.stack(out)


def error(predicted_LE: np.ndarray, came_LE: np.ndarray) -> float:
    return float(np.abs(np.log(predicted_LE + 1e-3) - np.log(came_LE + 1e-3)).mean())


def test_few_rows_are_not_taken_at_their_word():
    """With two rows per expert and window, the past tells more than the last window; with many, the last window is
    kept."""
    few = drifting(12, 128.0, 0.05)
    counted = np.random.default_rng(1).poisson(few).astype(float)
    assert error(predict(counted[:-1]), few[-1]) < 0.8 * error(np.maximum(counted[-2], 0.5), few[-1])
    many = drifting(12, 1e7, 0.15)
    assert error(predict(many[:-1]), many[-1]) < 1.05 * error(many[-2], many[-1])


def test_what_does_not_last_is_not_expected():
    """Loads that are drawn anew in each window: the best guess is that all are alike."""
    random = np.random.default_rng(0)
    history = np.exp(random.normal(size=(20, 4, 64))) * 1000
    spread = np.log(predict(history)).std()
    assert spread < 0.3 < np.log(history[-1]).std()


@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 8),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.3, 50.0, 1e6]),
)
def test_a_prediction_is_finite_and_has_the_last_windows_total(windows, layers, experts, seed, mean):
    history = np.random.default_rng(seed).poisson(mean, size=(windows, layers, experts)).astype(float)
    expected = predict(history)
    assert expected.shape == (layers, experts) and (expected >= 0).all()
    assert expected.sum(axis=1) == pytest.approx(history[-1].sum(axis=1))


def test_there_is_no_prediction_without_a_window():
    with pytest.raises(ValueError, match="at least one window"):
        predict(np.zeros((0, 1, 2)))
