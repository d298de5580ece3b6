from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isotherm.cluster.text.template_environment import ChatEnvironment
from isotherm.cluster.text.template_text import TemplateText, joined, own_mask, own_runs, written

# Two alphabets, so that every character tells by itself whose it is.
OWN, CLIENT = "AB< \n", "ab>\t\r"
PIECES = st.one_of(st.text(OWN, max_size=4).map(written), st.text(CLIENT, max_size=4))
MIXED = st.lists(PIECES, max_size=5).map(joined)
SMALL = st.integers(-6, 6)


def as_it_says(*texts: str) -> None:
    for text in texts:
        assert type(text) is TemplateText
        assert list(own_mask(text)) == [char in OWN for char in text]


@given(MIXED, PIECES, SMALL, SMALL, st.integers(0, 3))
def test_what_is_added_cut_and_repeated_keeps_its_writer(text, piece, begin, end, count):
    plain, other = str.__str__(text), str(piece)
    for result, expected in [
        (text + piece, plain + other),
        (piece + text, other + plain),
        (text * count, plain * count),
        (count * text, plain * count),
        (text[begin:end], plain[begin:end]),
        (text[::-1], plain[::-1]),
        (text.removeprefix(plain[:2]), plain[2:]),
        (text.removesuffix(plain[2:]), plain[:2] if len(plain) > 2 else plain),
        (written("A").join([piece, text, piece]), "A".join([other, plain, other])),
    ]:
        assert result == expected
        as_it_says(result)
    if plain:
        as_it_says(text[-1])


@given(MIXED, st.sampled_from([None, "a", "A", " ", "\t\n", "<a", "B>"]), st.integers(-1, 2))
def test_what_is_stripped_split_and_replaced_keeps_its_writer(text, sep, count):
    plain = "".join(text)
    for name in ("strip", "lstrip", "rstrip"):
        result = getattr(text, name)(sep)
        assert result == getattr(plain, name)(sep)
        as_it_says(result)
    for name in ("split", "rsplit"):
        parts = getattr(text, name)(sep, count)
        assert parts == getattr(plain, name)(sep, count)
        as_it_says(*parts)
    for keep in (False, True):
        assert text.splitlines(keep) == plain.splitlines(keep)
        as_it_says(*text.splitlines(keep))
    if sep is not None:
        assert (text.partition(sep), text.rpartition(sep)) == (plain.partition(sep), plain.rpartition(sep))
        as_it_says(*filter(None, text.partition(sep) + text.rpartition(sep)))
        for new in (written("BA"), "ba", ""):
            assert text.replace(sep, new, count) == plain.replace(sep, new, count)
            as_it_says(text.replace(sep, new, count))


def test_cases_keep_their_writer_where_the_length_stays():
    text = written("Abc") + "dEf"
    for name in ("upper", "lower", "title", "capitalize"):
        result = getattr(text, name)()
        assert result == getattr("AbcdEf", name)()
        assert own_mask(result) == b"\1\1\1\0\0\0"
    assert own_mask(written("ß").upper()) == b"\0\0"


@given(MIXED, PIECES)
def test_what_is_not_followed_gives_a_client_nothing(text, piece):
    made = ["".join([piece, text]), f"{piece}{text}", "%s%s" % (piece, text), text.format(), "A".replace("A", text)]  # noqa: UP031
    for result in [*made, text.center(40), text.zfill(40), text.expandtabs(), str(piece).replace("", text)]:
        assert all(char in OWN for char, own in zip(result, own_mask(result), strict=True) if own)
    assert not any(own_mask(TemplateText("".join([piece, text, ""]))))


@given(st.lists(PIECES, max_size=6))
def test_runs_are_where_the_mask_is(parts):
    runs = own_runs(parts)
    text = "".join(parts)
    inside = {at for begin, end in zip(runs[::2], runs[1::2], strict=True) for at in range(begin, end)}
    assert inside == {at for at, char in enumerate(text) if char in OWN}
    assert runs == sorted(set(runs))  # runs that touch are one


EXPRESSIONS = [
    ("{{ '<A>' + c + '<B>' }}", ["<A>", "<B>"]),
    ("{{ '<A>' ~ c ~ 5 ~ '<B>' }}", ["<A>", "<B>"]),
    ("{% macro m(x) %}<A>{{ x }}<B>{% endmacro %}{{ m(c) }}", ["<A>", "<B>"]),
    ("{% set x %}<A>{{ c }}{% endset %}{{ x | trim }}", ["<A>"]),
    ("{% macro m() %}<A>{{ caller(c) }}{% endmacro %}{% call(x) m() %}<B>{{ x }}{% endcall %}", ["<A><B>"]),
    ("{{ [c, '<A>', c] | join(c) }}", ["<A>"]),
    ("{{ [c, c] | join('<A>') }}", ["<A>"]),
    ("{{ {'k': '<A>'}['k'] ~ ['<B>', ('<C>',)][1][0] }}", ["<A><C>"]),
    ("{{ ('<A>' + c + '<B>').split(c)[1] }}", ["<B>"]),
    ("{{ ('<A>' + c) | replace(c, '<B>') }}", ["<A><B>"]),
    ("{% set ns = namespace(x='<A>') %}{% set ns.x = ns.x + c %}{{ ns.x }}", ["<A>"]),
    ("{{ c if not c else '<A>' }}{{ c or '<B>' }}", ["<A>"]),
    ("{{ missing | default('<A>') }}", ["<A>"]),
    ("{% for x in ['<A>', c] %}{{ x }}{% endfor %}", ["<A>"]),
    ("{% generation %}<A>{{ c }}{% endgeneration %}", ["<A>"]),
    ("{{ ['<A>'] | tojson }}{{ {'a': c} | tojson }}{{ '%s<A>' % c }}{{ '{}<A>'.format(c) }}", ['["<A>"]']),
    ("{{ c | safe + '<A>' }}{{ ('<A>' + c) | e }}", []),
    ("{% filter upper %}<a>{{ c }}{% endfilter %}", ["<A>"]),
]


@pytest.mark.parametrize(("source", "own"), EXPRESSIONS)
def test_what_a_template_writes_is_told_from_what_it_is_given(source, own):
    parts = list(ChatEnvironment().from_string(source).generate({"c": "<c>"}))
    text, runs = "".join(parts), own_runs(parts)
    assert [text[begin:end] for begin, end in zip(runs[::2], runs[1::2], strict=True)] == own


@given(st.text(string.printable, max_size=20))
def test_literals_come_out_as_they_were_written(text):
    source = "{% raw %}" + text.replace("{%", "").replace("\r", "") + "{% endraw %}"
    parts = list(ChatEnvironment().from_string(source).generate({}))
    assert all(all(own_mask(part)) for part in parts)


def test_templates_cannot_make_their_own_text_of_the_clients():
    environment = ChatEnvironment()
    for source in ("{{ ('a' + c)._own }}", "{{ 'a'.__class__ }}", "{{ environment }}", "{{ own_text }}"):
        parts = []
        try:
            parts = list(environment.from_string(source).generate({"c": "c"}))
        except Exception as error:
            assert type(error).__name__ == "SecurityError"
        assert "".join(parts) in ("", "c")
