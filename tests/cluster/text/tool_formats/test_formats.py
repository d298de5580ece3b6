"""Every format's parser: what it makes of a text, however that is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_texts import CASES, CITY, TOOLS, Case, coder, glm, hermes, v31

from isotherm.cluster.text.output import LastCall, OutputFields, joined
from isotherm.cluster.text.output_parsers import ThoughtAndCalls, make_parser
from isotherm.cluster.text.tool_formats.base import Offer
from isotherm.cluster.text.tool_formats.registry import TOOL_FORMATS

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.form}: {case.about}")


def parser(form: str, *, parallel: bool = True):
    return TOOL_FORMATS[form].parser(Offer(TOOLS, "call_{}".format, parallel))


def parse(form: str, pieces: list[str], *, parallel: bool = True) -> OutputFields:
    reading = parser(form, parallel=parallel)
    return joined([*(reading.feed(piece) for piece in pieces), reading.finish()])


@by_case
def test_what_a_text_is(case: Case):
    assert parse(case.form, [case.text]) == case.fields


@by_case
def test_however_it_is_cut_it_is_the_same(case: Case):
    text = case.text
    assert parse(case.form, list(text)) == case.fields
    step = max(1, len(text) // 500)
    for at in range(0, len(text), step):
        assert parse(case.form, [text[:at], text[at:]]) == case.fields, f"cut at {at}"


@by_case
@pytest.mark.parametrize("parallel", [True, False])
def test_after_a_thought_it_is_the_same(case: Case, parallel: bool):
    """And a thought that has the same calls in it makes none."""
    said = case.text
    if said != said.lstrip():
        return  # white space before a thought is left out, and none is here
    reading = ThoughtAndCalls(make_parser("think", "<Assistant><think>"), parser(case.form, parallel=parallel))
    fields = joined([*map(reading.feed, f"I could {said}</think>{said}"), reading.finish()])
    assert fields == joined([OutputFields(reasoning=f"I could {said}"), parse(case.form, [said], parallel=parallel)])
    assert not reading.is_reasoning


def test_there_are_many_cases_of_every_format():
    counted = {form: sum(case.form == form for case in CASES) for form in TOOL_FORMATS}
    assert min(counted.values()) > 20, counted


@pytest.mark.parametrize("case", [case for case in CASES if case.calls], ids=lambda case: f"{case.form}: {case.about}")
def test_without_parallel_calls_the_output_is_over_with_the_first(case: Case):
    reading = parser(case.form, parallel=False)
    pieces = []
    for char in case.text:
        assert not reading.is_over
        pieces.append(reading.feed(char))
        if reading.is_over:
            break
    if reading.is_over:
        assert reading.feed("more").is_empty
    fields = joined([*pieces, reading.finish()])
    assert fields.tool_calls == case.fields.tool_calls[:1]
    assert fields == parse(case.form, [case.text], parallel=False)
    assert not reading.tags or not reading.is_over


@pytest.mark.parametrize("case", [case for case in CASES if case.calls], ids=lambda case: f"{case.form}: {case.about}")
def test_id_and_name_come_once_and_first(case: Case):
    reading = parser(case.form)
    pieces = [piece for char in case.text for piece in reading.feed(char).tool_calls]
    pieces += reading.finish().tool_calls
    seen = set()
    for piece in pieces:
        assert bool(piece.id) == bool(piece.name) == (piece.index not in seen)
        seen.add(piece.index)
    assert seen == set(range(len(case.calls)))


A, B = '{"city": "x", ', '"days": 2}'
PARAMETER, PARAMETER_END = "<｜DSML｜parameter", "</｜DSML｜parameter>"
CITY_PAIR = f'{PARAMETER} name="city" string="true">x{PARAMETER_END}\n'
DAYS_PAIR = f'{PARAMETER} name="days" string="false">2{PARAMETER_END}\n'
INVOKE = '<｜DSML｜invoke name="get_weather">'
NO, OPEN, UNMARKED, CLOSED = LastCall.NONE, LastCall.OPEN, LastCall.UNMARKED, LastCall.CLOSED


@pytest.mark.parametrize(
    ("form", "pieces"),
    [
        *(
            (form, [("It is ", NO), (head, NO), (sep, UNMARKED), (A, OPEN), (B, CLOSED), (end, CLOSED), ("so", CLOSED)])
            for form, head, sep, end in (
                ("deepseek_v3.1", "<｜tool▁call▁begin｜>now", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
                ("kimi_k2", "<|tool_call_begin|>functions.now:0", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
            )
        ),
        (
            "deepseek_v3",
            [
                ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>now", NO),
                ("\n```json\n", UNMARKED),
                (A, OPEN),
                ('"days', OPEN),
                ("\n```<｜tool▁call▁end｜>", CLOSED),
                ("<｜tool▁call▁begin｜>now<｜tool▁sep｜>3", OPEN),
            ],
        ),
        ("deepseek_v3.1", [("<｜tool▁call▁begin｜>now<｜tool▁sep｜>3", OPEN), ("<｜tool▁calls▁end｜>", CLOSED)]),
        (
            "hermes",
            [
                ('<tool_call>\n{"name": "now', NO),
                ('"', UNMARKED),
                (', "arguments": ', UNMARKED),
                (A, OPEN),
                (B, CLOSED),
                ("}", CLOSED),
                ("\n</tool_call>", CLOSED),
                ('<tool_call>{"arguments": {"a": 1}, "name": "now"', CLOSED),
                ("}", CLOSED),
                ('<tool_call>{"name": "now", "arguments": {"a": 1', OPEN),
                ("</tool_call>", CLOSED),
            ],
        ),
        (
            "glm4",
            [
                ("<tool_call>get_weather\n", UNMARKED),
                ("<arg_key>ci", OPEN),
                ("ty</arg_key>\n", OPEN),
                ("<arg_value>x", OPEN),
                ("</arg_value>\n", UNMARKED),
                ("<arg_key>days</arg_key><arg_value>2", OPEN),
                ("</arg_value>", UNMARKED),
                ("</tool_call>", CLOSED),
                ("\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>", OPEN),
            ],
        ),
        (
            "qwen3_coder",
            [
                ("<tool_call>\n<function=now", NO),
                (">\n", UNMARKED),
                ("<parameter=ci", OPEN),
                ("ty>\n", OPEN),
                ("x\n", OPEN),
                ("</parameter>\n", UNMARKED),
                ("<parameter=days>\n2", OPEN),
                ("\n</parameter>\n", UNMARKED),
                ("</function>", CLOSED),
                ("\n</tool_call>", CLOSED),
                ("\n<tool_call>\n<function=get_weather>\n<parameter=city>\n", OPEN),
            ],
        ),
        (
            "deepseek_v3.2",
            [
                (INVOKE, UNMARKED),
                (f"\n{CITY_PAIR[:-30]}", OPEN),
                (CITY_PAIR[-30:], UNMARKED),
                (DAYS_PAIR[:22], OPEN),
                (DAYS_PAIR[22:], UNMARKED),
                ("</｜DSML｜invoke>", CLOSED),
                (f"\n{INVOKE}{A}", OPEN),
                (B, CLOSED),
                (f"\n{INVOKE}\n{CITY_PAIR}", UNMARKED),
                ("</｜DSML｜function_calls>", CLOSED),
            ],
        ),
    ],
)
def test_how_far_the_last_call_has_come(form: str, pieces: list[tuple[str, LastCall]]):
    """Where the text ends after each of the pieces, however it comes."""
    text = ""
    for piece, expected in pieces:
        text += piece
        for cut in ([text], list(text)):
            reading = ThoughtAndCalls(make_parser("think"), parser(form))
            for part in cut:
                reading.feed(part)
            reading.finish()
            assert reading.last_call is expected, text


@pytest.mark.parametrize(
    ("form", "before", "after"),
    [
        (
            "deepseek_v3.1",
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{"a": "',
            '"}<｜tool▁call▁end｜>',
        ),
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {"a": "', '"}}\n</tool_call>'),
        ("glm4", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>", "</arg_value>\n</tool_call>"),
        (
            "qwen3_coder",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\n",
            "\n</parameter>\n</function>\n</tool_call>",
        ),
        (
            "deepseek_v3.2",
            '<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">',
            "</｜DSML｜parameter>",
        ),
    ],
)
def test_a_long_string_comes_as_it_is_written(form: str, before: str, after: str):
    reading = parser(form)
    reading.feed(before)
    for i in range(500):
        written = f"line {i} of a file, "
        assert joined([reading.feed(written)]).tool_calls[0].arguments == written
    assert "line" not in joined([reading.feed(after), reading.finish()]).tool_calls[0].arguments


def test_text_comes_as_it_is_written():
    for form in TOOL_FORMATS:
        reading = parser(form)
        assert reading.feed("So,") == OutputFields("So,")
        assert reading.feed(" 3 is") == OutputFields(" 3 is")
        assert reading.feed(" <") == OutputFields()  # it may begin a call
        assert reading.feed("4").content == " <4"


def test_tags_are_those_that_would_mean_something():
    reading = parser("deepseek_v3.1", parallel=False)
    assert set(reading.tags) == {"<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"}
    reading.feed("<｜tool▁calls▁begin｜>")
    assert {"<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"} < set(reading.tags)
    reading.feed("<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}")
    assert not reading.tags
    thinking = ThoughtAndCalls(make_parser("think", "<think>"), parser("deepseek_v3.1"))
    assert set(thinking.tags) == {"<think>", "</think>"}
    thinking.feed("so</think>")
    assert "<｜tool▁calls▁begin｜>" in thinking.tags
    assert "｜DSML｜" in parser("deepseek_v3.2").tags


PARTS = {
    "deepseek_v3.1": [
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        "function",
        "now",
        "\n```json\n",
        "\n```",
        v31(("now", CITY)),
    ],
    "kimi_k2": [
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>",
        "functions.now:0",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    ],
    "hermes": ["<tool_call>", "</tool_call>", '{"name": "now"', ', "arguments": ', "<tool", hermes(("now", CITY))],
    "glm4": [
        "<tool_call>",
        "now",
        "get_weather",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "</tool_call>",
        glm("get_weather", ("city", "x")),
    ],
    "qwen3_coder": [
        "<tool_call>",
        "<function=",
        "<function=now>",
        "<function=get_weather>",
        "<parameter=",
        "<parameter=city>",
        "<parameter=days>",
        "</parameter>",
        "</function>",
        "</tool_call>",
        ">",
        coder("get_weather", ("city", "x")),
    ],
    "deepseek_v3.2": [
        "<｜DSML｜function_calls>",
        '<｜DSML｜invoke name="now">',
        "<｜DSML｜invoke",
        '<｜DSML｜parameter name="a" string="true">',
        '<｜DSML｜parameter name="b" string="false">',
        "</｜DSML｜parameter>",
        "</｜DSML｜invoke>",
        "</｜DSML｜function_calls>",
        ">",
    ],
}
COMMON = ["{", "}", '"', "\\", ":", ",", "[", "]", " ", "\n", "日", CITY, "<", "<｜", "{}", "'", "\\ud83d"]


@pytest.mark.parametrize("form", sorted(PARTS))
@given(data=st.data())
def test_whatever_is_written_nothing_is_raised_and_no_text_is_lost(form: str, data: st.DataObject):
    text = "".join(data.draw(st.lists(st.sampled_from(PARTS[form] + COMMON), max_size=14)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    whole = parse(form, [text])
    assert whole == parse(form, list(text))
    assert whole == parse(form, [text[a:b] for a, b in pairwise([0, *sorted(cuts), len(text)])])
    told = whole.content + "".join(call.name + call.arguments for call in whole.tool_calls)
    told.encode()
    if form != "hermes":  # a call of which may have members that say nothing
        assert told.count("日") == text.count("日")
    assert parse(form, [text], parallel=False) == parse(form, list(text), parallel=False)
