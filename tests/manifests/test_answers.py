"""What the bundled model is taught to answer: the steps that an answer says are right, and so is what they come to."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from tiny_recipe import tiny_recipe

Module = Callable[[str], ModuleType]
DRAWS = 300


@pytest.fixture(scope="module")
def recipe() -> Iterator[Module]:
    with tiny_recipe() as module:
        yield module


def asked(recipe: Module, module: str, kind: str) -> Iterator[tuple[str, str]]:
    r, make = random.Random(5), getattr(recipe(module), kind)
    for _ in range(DRAWS):
        question, answer = make(r)
        yield question, recipe("dialogue").unmarked(answer)


@pytest.mark.parametrize("kind", ["added_long", "subtracted_long", "added_three"])
def test_every_equation_of_a_sum_holds(recipe: Module, kind: str):
    steps = 0
    for question, answer in asked(recipe, "sums", kind):
        equations = re.findall(r"([\d +-]+) = (\d+)\.", answer)
        assert equations and all(eval(left) == int(right) for left, right in equations), answer
        a, b, *_ = map(int, re.findall(r"\d+", question))
        last = equations[-1][0].strip()
        if kind == "added_three":
            assert len(equations) == 2 and int(equations[-1][1]) == sum(map(int, re.findall(r"\d+", question)))
            continue
        assert last in (f"{a} + {b}", f"{a} - {b}", f"{b} - {a}"), "the equation that was asked for comes last"
        by_digits = max(a, b) > 99
        assert len(equations) == (1 + len(str(max(a, b))) if by_digits else 1)
        steps += by_digits
    assert kind == "added_three" or DRAWS > steps > DRAWS // 3


def test_digits_carry_and_borrow(recipe: Module):
    sums = recipe("sums")
    assert sums.sum_by_digits(606, 98) == "Ones: 6 + 8 = 14. Tens: 0 + 9 + 1 = 10. Hundreds: 6 + 0 + 1 = 7."
    assert sums.difference_by_digits(842, 483) == "Ones: 12 - 3 = 9. Tens: 14 - 8 - 1 = 5. Hundreds: 8 - 4 - 1 = 3."
    assert sums.difference_by_digits(100, 1) == "Ones: 10 - 1 = 9. Tens: 10 - 0 - 1 = 9. Hundreds: 1 - 0 - 1 = 0."


def test_letters_are_numbered_up_to_the_one_that_is_asked_for(recipe: Module):
    ordinals = recipe("letters").ORDINALS
    for question, answer in asked(recipe, "letters", "letter_at"):
        steps, which, word, letter = re.fullmatch(r"(.*)\. The (\w+) letter of (\w+) is (\w)\.", answer).groups()
        n = len(word) if which == "last" else ordinals.index(which) + 1
        assert steps == ", ".join(f"{i} {x}" for i, x in enumerate(word[:n], 1)) and letter == word[n - 1]
        assert which in question and word in question


def test_letters_and_words_are_numbered_before_they_are_counted(recipe: Module):
    for question, answer in asked(recipe, "letters", "letter_count"):
        *steps, last = re.split(r"[,.] ", answer)
        word, n = re.fullmatch(r"The word (\w+) has (\d+) letters\.", last).groups()
        assert "".join(step.split()[1] for step in steps) == word and word in question
        assert [int(step.split()[0]) for step in steps] == list(range(1, int(n) + 1))
    for question, answer in asked(recipe, "letters", "word_count"):
        *steps, last = re.split(r"[,.] ", answer)
        n = int(re.fullmatch(r"There (?:is|are) (\d) words?\.", last)[1])
        assert " ".join(step.split()[1] for step in steps) in question and int(steps[-1].split()[0]) == n == len(steps)


def test_a_letter_is_numbered_where_it_is_in_the_word(recipe: Module):
    seen = set()
    for question, answer in asked(recipe, "letters", "one_letter_count"):
        steps, letter, times = re.fullmatch(r"(.*)\. The letter (\w) is (.*)\.", answer).groups()
        word = "".join(step.split()[0] for step in steps.split(", "))
        n = word.count(letter)
        assert times == {0: f"not in {word}", 1: f"in {word} once", 2: f"in {word} twice"}.get(
            n, f"in {word} {n} times"
        )
        assert re.findall(r"\w \d", steps) == [f"{letter} {i}" for i in range(1, n + 1)] and word in question
        seen.add(min(n, 3))
    assert seen == {0, 1, 2, 3}


def test_days_and_months_are_gone_through_one_by_one(recipe: Module):
    texts, far = recipe("texts"), 0
    for _, answer in asked(recipe, "tasks", "calendar"):
        if not re.match(r"1 \w+, 2 ", answer):
            continue
        steps, n, start, end = re.fullmatch(r"(.*)\. (\d) \w+ after (\w+) is (\w+)\.", answer).groups()
        names = texts.DAYS if start in texts.DAYS else texts.MONTHS
        way = [names[(names.index(start) + i) % len(names)] for i in range(1, int(n) + 1)]
        assert steps == ", ".join(f"{i} {name}" for i, name in enumerate(way, 1)) and end == way[-1]
        far += 1
    assert far > DRAWS // 20
