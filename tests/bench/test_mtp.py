"""What `make bench-mtp` takes for a failure, and which requests it compares."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
from deepseek_checkpoints import make_checkpoint
from grammars import tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parent))

from mtp import (
    OWN_TEXT,
    PIECE,
    RANDOM_WEIGHTS,
    SERVED,
    Goal,
    decoded,
    engine_of,
    in_turn,
    requests_of,
    speed_goal,
    status_of,
    token_goal,
)

from isotherm.cluster.engine.config import SchedulerConfig


def test_the_goals_are_those_of_speculation():
    assert OWN_TEXT == {1: 1.5, 32: 0.98} and RANDOM_WEIGHTS == {1: 0.98, 8: 0.98, 32: 0.98} and SERVED == {1: 1.3}


def test_one_missed_goal_is_the_status_and_is_named(capsys: pytest.CaptureFixture[str]):
    assert status_of([speed_goal("own text", 1.6, 1.5), speed_goal("more", 0.5, None)]) == 0
    assert capsys.readouterr().out == "passed  own text: × 1.600, at least 1.50\npassed  more: × 0.500\n"
    assert status_of([Goal("tokens", ""), speed_goal("own text", 1.4987, 1.5)]) == 1
    assert capsys.readouterr().out.splitlines()[1] == "MISSED  own text: × 1.499, at least 1.50: too slow"


@pytest.mark.parametrize(
    ("found", "missed"),
    [
        (([], "", 5, 2), ""),
        ((["r1-0", "r2-0"], "", 5, 2), "2 differ, as r1-0, r2-0"),
        (([], "drafting failed: x", 5, 2), "drafting failed: x"),
        (([], "", 0, 2), "no draft was right"),
        (([], "", 5, 0), "no stream gave way: ask for more --requests"),
        ((["r1-0"], "", 0, 2), "1 differ, as r1-0; no draft was right"),
    ],
)
def test_tokens_that_show_nothing_are_no_success(found: tuple, missed: str):
    assert token_goal("tokens", *found).missed == missed


def test_sides_are_measured_in_turn_and_the_first_time_is_not_counted():
    asked: list[tuple[str, int]] = []

    def side(name: str, seconds: list[list[float]]):
        def pieces(prompts: list[tuple[int, ...]]):
            for took in seconds.pop(0):
                asked.append((name, len(prompts)))
                yield 10, took

        return pieces

    sides = {
        "off": side("off", [[9.0], [1.0, 1.0, 1.0], [1.0], [1.0]]),
        "mtp": side("mtp", [[1.0], [0.75, 0.75], [0.5], [2.0]]),
    }
    ratio = in_turn(sides, [[(1,)] * n for n in (1, 2, 3, 4)])
    assert ratio == pytest.approx(1 / 0.75)
    assert asked == [("off", 1), ("mtp", 1), *[("off", 2), ("mtp", 2)] * 2, ("off", 2), *[
        (name, n) for n in (3, 4) for name in ("off", "mtp")
    ]]  # fmt: skip


def test_all_tokens_but_those_of_the_first_steps_are_timed():
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder))
        engine = engine_of(path, "off", SchedulerConfig(16, 64, 64, 4, 256))
        ticks = iter(range(10**6))
        pieces = list(decoded(engine, [(1, 2, 3), (4, 5)], lambda: float(next(ticks))))
    assert [tokens for tokens, _ in pieces[:-1]] == [2 * PIECE] * (len(pieces) - 1)
    assert 0 < pieces[-1][0] <= 2 * PIECE and len(pieces) > 3
    assert all(seconds == tokens / 2 for tokens, seconds in pieces), "a tick for each step of two tokens"


def test_requests_ask_for_whatever_changes_what_is_drawn():
    asked = requests_of(tiny_tokenizer(), 300)
    params = [request.params for request in asked]
    for name in ("presence_penalty", "frequency_penalty", "logit_bias", "min_p", "min_tokens", "bad_words", "logprobs",
                 "constraint", "max_thinking_tokens", "temperature"):  # fmt: skip
        assert 10 < sum(bool(getattr(one, name)) for one in params) < 290, name
    assert any(one.repetition_penalty != 1 for one in params) and any(len(one.stop_token_ids) > 1 for one in params)
    assert any(request.family for request in asked) and len({request.id for request in asked}) == 300
