"""What `make bench-mtp` takes for a failure, and which requests it compares."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from grammars import tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parent))

from mtp import OWN_TEXT, RANDOM_WEIGHTS, SERVED, Goal, in_turn, requests_of, speed_goal, status_of, token_goal


def test_the_goals_are_those_of_speculation():
    assert OWN_TEXT == {1: 1.5, 32: 0.98} and RANDOM_WEIGHTS == {1: 0.98, 8: 0.98, 32: 0.98} and SERVED == {1: 1.3}


def test_one_missed_goal_is_the_status_and_is_named(capsys: pytest.CaptureFixture[str]):
    assert status_of([speed_goal("own text", 1.6, 1.5), speed_goal("more", 0.5, None)]) == 0
    assert capsys.readouterr().out == "passed  own text: × 1.60, at least 1.50\npassed  more: × 0.50\n"
    assert status_of([Goal("tokens", ""), speed_goal("own text", 1.49, 1.5)]) == 1
    assert capsys.readouterr().out.splitlines()[1] == "MISSED  own text: × 1.49, at least 1.50: too slow"


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
    asked: list[tuple[str, str]] = []

    def side(name: str, speeds: list[float]):
        return lambda prompts: (asked.append((name, prompts)), speeds.pop(0))[1]

    ratio = in_turn({"off": side("off", [1.0, 10.0, 10.0, 10.0]), "mtp": side("mtp", [9.0, 12.0, 30.0, 15.0])}, "abcd")
    assert ratio == 1.5 and asked == [(name, prompts) for prompts in "abcd" for name in ("off", "mtp")]


def test_requests_ask_for_whatever_changes_what_is_drawn():
    asked = requests_of(tiny_tokenizer(), 300)
    params = [request.params for request in asked]
    for name in ("presence_penalty", "frequency_penalty", "logit_bias", "min_p", "min_tokens", "bad_words", "logprobs",
                 "constraint", "max_thinking_tokens", "temperature"):  # fmt: skip
        assert 10 < sum(bool(getattr(one, name)) for one in params) < 290, name
    assert any(one.repetition_penalty != 1 for one in params) and any(len(one.stop_token_ids) > 1 for one in params)
    assert any(request.family for request in asked) and len({request.id for request in asked}) == 300
