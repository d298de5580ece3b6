"""Reads give what the text alone says, wherever it was cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from isotherm.cluster.text.tool_formats.reader import Reader


def read(pieces, script):
    """What `script`, a generator over a reader, takes of a text that comes in these pieces."""
    reader, out = Reader(), []
    reading = script(reader, out)
    for piece in pieces:
        reader.put(piece)
        next(reading, None)
    reader.ended = True
    next(reading, None)
    return out


def cuts(text, at):
    ends = [0, *sorted(min(a, len(text)) for a in at), len(text)]
    return [text[a:b] for a, b in pairwise(ends)]


def everything(reader, out):
    """Reads of every kind, one after the other."""
    while True:
        text, marker = yield from reader.take_until("<a>", "<abc>", "}", "a<")
        out.append((text, marker))
        if not marker:
            return
        spaces = yield from reader.spaces()
        option = yield from reader.option("{", "[", '"', "<a")
        if option not in ("{", "["):
            out.append((spaces, option))
        if option == '"':
            text, closed = yield from reader.string()
            out.append((text, '"' if closed else ""))
        elif option in ("{", "["):
            reader.back(option)
            out.append((spaces, ""))
            passed = []
            marker = yield from reader.json_value("<a>", "<abc>", passed=passed.append)
            out.append(("".join(passed), marker))


TEXT = st.lists(
    st.sampled_from(["<a>", "<abc>", "<", "a", "<a", "b", "}", "{", "[", "]", '"', "\\", " ", "\n", ","]), max_size=20
).map("".join)


@given(TEXT, st.lists(st.integers(0, 80), max_size=8))
@example("<a<abc>x", [3])
@example('<a>{"<a>\n', [6, 7])
def test_however_a_text_is_cut_the_reads_are_the_same(text, at):
    whole = read([text], everything)
    assert whole == read(list(text), everything) == read(cuts(text, at), everything)


@given(TEXT)
def test_nothing_is_lost(text):
    assert "".join(part for pair in read(list(text), everything) for part in pair) == text


def test_what_is_certain_is_passed_at_once():
    reader, passed = Reader(), []
    reading = reader.until("<a>", passed=passed.append)
    for piece in ("text", " <", "b and <a", ">rest"):
        reader.put(piece)
        try:
            next(reading)
        except StopIteration as end:
            assert end.value == "<a>"
    assert passed == ["text", " ", "<b and "]


def test_a_value_ends_with_its_last_bracket():
    def value(reader, out):
        reader_end = yield from reader.json_value("END", passed=out.append)
        out.append(reader_end)
        out.append((yield from reader.take_until("END"))[0])

    for text, rest in (('{"a": "}", "b": [1, {}]}', " x"), ('["\\"]"]', ""), ("{}", "}")):
        out = read(list(text + rest), value)
        assert "".join(out) == text + rest and out[-1] == rest


def test_an_end_within_a_string_is_a_part_of_it_unless_the_string_has_lost_its_quote():
    def value(reader, out):
        end = yield from reader.json_value("<e>", "<f>", passed=out.append)
        out.append((end, (yield from reader.take_until("<f>"))))

    for text, parts in (
        ('{"a": "b<e>c"}<e>', ('{"a": "b<e>c"}', ("", ("<e>", "")))),
        ('{"a": "b<e><f>', ('{"a": "b', ("<e>", ("", "<f>")))),
        ('{"a": "b<e>\n', ('{"a": "b', ("<e>", ("\n", "")))),
        ('{"a": "b<e>', ('{"a": "b', ("<e>", ("", "")))),
        ('{"a": "b<e><', ('{"a": "b<e><', ("", ("", "")))),
    ):
        for out in (read([text], value), read(list(text), value)):
            assert ("".join(out[:-1]), out[-1]) == parts


def test_the_earliest_marker_counts_though_another_is_complete_before():
    def first(reader, out):
        out.append((yield from reader.take_until("a{b}c", "{")))

    assert read(list("xa{b}c"), first) == read(["xa{b}c"], first) == [("x", "a{b}c")]
    assert read(list("xa{b}d"), first) == read(["xa{b}d"], first) == [("xa", "{")]
