"""What the bundled model is taught to answer: the steps that an answer says are right, and so is what they come to."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
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
    assert sums.difference_by_digits(842, 483) == (
        "Ones: 2 - 3, 12 - 3 = 9. Tens: 4 - 8 - 1, 14 - 8 - 1 = 5. Hundreds: 8 - 4 - 1 = 3."
    )
    assert sums.difference_by_digits(100, 1) == (
        "Ones: 0 - 1, 10 - 1 = 9. Tens: 0 - 0 - 1, 10 - 0 - 1 = 9. Hundreds: 1 - 0 - 1 = 0."
    )
    assert sums.difference_by_digits(45, 44) == "Ones: 5 - 4 = 1. Tens: 4 - 4 = 0."


def test_letters_are_counted_down_to_the_one_that_is_asked_for(recipe: Module):
    ordinals = recipe("letters").ORDINALS
    for question, answer in asked(recipe, "letters", "letter_at"):
        steps, which, word, letter = re.fullmatch(r"(.*)\. The (\w+) letter of (\w+) is (\w)\.", answer).groups()
        n = len(word) if which == "last" else ordinals.index(which) + 1
        numbers = range(1, n + 1) if which == "last" else range(n, 0, -1)
        assert steps == ", ".join(f"{i} {x}" for i, x in zip(numbers, word[:n], strict=True)) and letter == word[n - 1]
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
        steps, said, letter, times = re.fullmatch(r"(.*): (\d)\. The letter (\w) is (.*)\.", answer).groups()
        word = "".join(step.split()[0] for step in steps.split(", "))
        n = word.count(letter)
        assert int(said) == n and times == {0: f"not in {word}", 1: f"in {word} once", 2: f"in {word} twice"}.get(
            n, f"in {word} {n} times"
        )
        assert re.findall(r"\w \d", steps) == [f"{letter} {i}" for i in range(1, n + 1)] and word in question
        seen.add(min(n, 3))
    assert seen == {0, 1, 2, 3}


def test_days_and_months_are_gone_through_one_by_one(recipe: Module):
    texts, far = recipe("texts"), 0
    for _, answer in asked(recipe, "tasks", "calendar"):
        if not re.match(r"[2-5] \w+, ", answer):
            continue
        steps, n, start, end = re.fullmatch(r"(.*)\. (\d) \w+ after (\w+) is (\w+)\.", answer).groups()
        names = texts.DAYS if start in texts.DAYS else texts.MONTHS
        way = [names[(names.index(start) + i) % len(names)] for i in range(1, int(n) + 1)]
        assert steps == ", ".join(f"{int(n) - i} {name}" for i, name in enumerate(way)) and end == way[-1]
        far += 1
    assert far > DRAWS // 20


def test_where_a_list_ends_can_be_read(recipe: Module):
    """Between fields of a record that has one stands another mark than between the list's own parts."""
    structured, r, lists = recipe("structured"), random.Random(5), 0
    for _ in range(300):
        made = structured.record(r)
        text = structured.told(r, made)
        if any(isinstance(value, list) for value in made.values()):
            assert [structured.written(value) in part for value, part in
                    zip(made.values(), text.split("; "), strict=True)] == [True] * len(made)  # fmt: skip
            lists += 1
    assert lists > 30


def test_numbers_are_aligned_before_they_are_compared(recipe: Module):
    """By as many digits each, unless they have as many."""
    seen = set()
    for kind in ("compared", "extreme", "ordered"):
        for question, answer in asked(recipe, "sums", kind):
            given = re.findall(r"\d+", question)
            *way, last = answer.rstrip(".").split(". ")
            differ = len({len(number) for number in given}) > 1
            assert way == ([", ".join(number.zfill(max(map(len, given))) for number in given)] if differ else [])
            order = sorted(map(int, given), reverse="larger" in last)
            told = list(map(int, re.findall(r"\d+", last)))
            wanted = order[-1:] if "largest" in last else order[:1] if "smallest" in last else order
            assert told == wanted, (question, answer)
            seen.add((kind, differ))
    assert len(seen) == 6


@pytest.mark.parametrize("kind", ["word_problem", "long_sum"])
def test_a_thought_goes_by_digits(recipe: Module, kind: str):
    r, by_digits = random.Random(5), 0
    for _ in range(DRAWS):
        question, thought, answer = getattr(recipe("sums"), kind)(r)
        equations = re.findall(r"(\d[\d +×-]*) = (\d+)\.", thought)
        assert equations and all(eval(left.replace("×", "*")) == int(right) for left, right in equations), thought
        assert equations[-1][1] in re.findall(r"\d+", answer) and len(equations) in (1, 3, 4)
        assert len(equations) > 1 or "×" in thought or max(map(int, re.findall(r"\d+", question))) < 10
        by_digits += len(equations) > 1
    assert by_digits > DRAWS // 3


def test_after_the_last_table_that_was_said_comes_nothing(recipe: Module):
    for seed in range(20):
        text = recipe("data").long_tables(random.Random(seed)).messages[-1]["content"]
        first, *lines = text.split("\n")
        tables = list(map(int, re.fullmatch(r"(\d+(?:, \d+)*):", first)[1].split(", ")))
        assert lines == [f"{a} × {b} = {a * b}" for a in tables for b in range(1, 11)] and tables[0] == 2


def test_who_has_said_a_name_is_known_by_it(recipe: Module):
    """No dialogue has two answers to one question."""
    r = random.Random(5)
    for _ in range(DRAWS * 3):
        text = recipe("talk").turns(r).render()
        assert "Nice to meet you" not in text or "I do not know your name" not in text


def test_no_size_of_number_is_left_out(recipe: Module):
    """What no draw reaches is never learned, and no held-out document shows it."""
    near = [
        (a, b)
        for question, _ in asked(recipe, "sums", "subtracted")
        for a, b in [map(int, re.findall(r"\d+", question))]
        if abs(a - b) < 10 <= min(a, b)
    ]
    assert len(near) > DRAWS / 10
    many = {int(found[0]) for _, answer in asked(recipe, "tasks", "units") if (found := re.findall(r"^\d+", answer))}
    assert many == set(range(2, 11))


def test_capitals_are_of_no_json(recipe: Module):
    """Whose names would be others then."""
    talk, r = recipe("talk"), random.Random(5)
    kinds = [make for make, _ in talk.SYSTEM if make.__name__.startswith("system_capitals_")]
    assert len(kinds) == 4
    for make in kinds:
        answers = [make(r).messages[-1]["content"] for _ in range(DRAWS)]
        assert not any("{" in answer for answer in answers) and all(answer == answer.upper() for answer in answers)


def test_a_tool_is_called_for_what_is_known_without_it_and_by_its_name(recipe: Module):
    """What no draw asks is said without the tool: small sums, `Use add to compute 3 + 4.`, a calculator's text."""
    tools, r = recipe("tools"), random.Random(5)
    by_name = small = expressions = with_unit = 0
    for _ in range(8 * DRAWS):
        doc = tools.tools(r)
        question, call = next((a["content"], b["tool_calls"][0]["function"]) for a, b in pairwise(doc.messages)
                              if b.get("tool_calls"))  # fmt: skip
        arguments = json.loads(call["arguments"])
        by_name += any(f"{verb} {name}" in question for verb in ("Use", "Call") for name in
                       (call["name"], f"the {call['name']} tool"))  # fmt: skip
        small += tuple(arguments) in tools.OPERANDS and max(arguments.values()) < 13
        if "expression" in arguments:
            assert re.fullmatch(r"\d+ [-+*] \d+", arguments["expression"]) and eval(arguments["expression"]) >= 0
            assert any(f"= {eval(arguments['expression'])}." in (one["content"] or "") for one in doc.messages)
            expressions += 1
        if isinstance(arguments.get("unit"), str):
            assert arguments["unit"] in question.lower()
            with_unit += 1
        called, *others = sorted(doc.tools, key=lambda one: one["function"]["name"] != call["name"])
        assert not (tools.computes(called) and any(map(tools.computes, others))), "either could be meant"
    assert min(by_name, small, expressions, with_unit) > DRAWS / 10, (by_name, small, expressions, with_unit)


def test_json_is_read_as_python_and_javascript_send_it(recipe: Module):
    """`{"result":7}` is a third of what tools say: who has never seen it reads another number."""
    tools, structured, r = recipe("tools"), recipe("structured"), random.Random(5)
    said = [one["content"] for _ in range(DRAWS) for one in tools.tools(r).messages if one["role"] == "tool"]
    asked_by = [structured.json_schema(r)[0] for _ in range(DRAWS)]
    for texts in (said, asked_by):
        assert sum('":' in text and '": ' not in text for text in texts) > DRAWS / 8
        assert sum('": ' in text and "\n  " not in text for text in texts) > DRAWS / 8
        assert sum("{\n  " in text for text in texts) > DRAWS / 60
