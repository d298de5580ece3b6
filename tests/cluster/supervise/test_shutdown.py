"""Steps of a shutdown: none that hangs or fails keeps another from being done."""

from __future__ import annotations

import threading
import time

from isotherm.cluster.supervise.shutdown import Step, carry_out


def test_every_step_is_done_whatever_becomes_of_the_others():
    done: list[str] = []
    never = threading.Event()

    def fail() -> None:
        raise RuntimeError("no\nway")

    def leave() -> None:
        raise SystemExit(3)

    begin = time.monotonic()
    troubles = carry_out([
        Step("first", 5.0, lambda: done.append("first")),
        Step("fails", 5.0, fail),
        Step("hangs", 0.2, lambda: never.wait() and None),
        Step("leaves", 5.0, leave),
        Step("last", 5.0, lambda: done.append("last")),
    ])  # fmt: skip
    never.set()
    assert done == ["first", "last"]
    assert troubles == ["fails: no", "hangs: not done in 0.2 s", "leaves: 3"]
    assert time.monotonic() - begin < 2


def test_what_goes_well_is_not_spoken_of():
    assert carry_out([Step("a", 1.0, lambda: None)]) == []
