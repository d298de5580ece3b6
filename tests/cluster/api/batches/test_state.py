from __future__ import annotations

import pytest

from isotherm.cluster.api.batches.state import moved, new_batch, shown, window_seconds


@pytest.mark.parametrize(("window", "seconds"), [("24h", 86400), ("1h", 3600), ("30m", 1800), ("168h", 604800)])
def test_windows(window, seconds):
    assert window_seconds(window) == seconds


@pytest.mark.parametrize("window", ["", "h", "24", "0h", "-1h", "1d", "169h", "٣h", "9" * 50 + "h", "00000000199999h"])
def test_other_windows_are_refused(window):
    with pytest.raises(ValueError):
        window_seconds(window)


def test_each_status_has_its_time_and_cancelling_shows_until_the_end():
    batch = new_batch("batch_1", "/v1/completions", "file-1", "1h", {"a": "b"}, None, 100.7)
    assert (batch["status"], batch["created_at"], batch["expires_at"]) == ("validating", 100, 3700)
    batch = moved(batch, "in_progress", 101.2, request_counts={"total": 1})
    assert (batch["status"], batch["in_progress_at"], batch["request_counts"]) == ("in_progress", 101, {"total": 1})
    seen = shown(batch, 102.0)
    assert (seen["status"], seen["cancelling_at"]) == ("cancelling", 102)
    assert "then" not in seen and "output_expires_after" not in seen
    assert shown(moved(batch, "cancelled", 103), 102.0)["status"] == "cancelled"
