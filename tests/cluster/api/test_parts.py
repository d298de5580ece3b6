from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isotherm.cluster.api.parts import Part, PartKind, Parts
from isotherm.cluster.text.output import OutputFields, ToolCallPiece


def content(text):
    return OutputFields(text)


def thought(text):
    return OutputFields(reasoning=text)


def call(index, arguments="", name=""):
    return OutputFields(tool_calls=(ToolCallPiece(index, name and f"call_{index}", name, arguments),))


def run(pieces):
    parts = Parts()
    steps = [step for piece in pieces for step in parts.feed(piece)] + parts.finish()
    return parts.all, steps


def shown(parts: list[Part]):
    return [(part.kind.value, part.name, part.text) for part in parts]


def test_a_call_gets_its_last_words_before_the_text_that_follows_it():
    """In one delta they came after it, so that a stream's call went on after its end."""
    piece = OutputFields("Done.", tool_calls=(ToolCallPiece(0, arguments="}"), ToolCallPiece(1, "call_1", "g", "[]")))
    parts, steps = run([call(0, "{", "f"), piece])
    assert shown(parts) == [("call", "f", "{}"), ("text", "", "Done."), ("call", "g", "[]")]
    ended: set[int] = set()
    for step in steps:
        assert step.part.index not in ended
        if step.what == "ends":
            ended.add(step.part.index)


def test_parts_come_one_after_another():
    pieces = [thought("hm"), content("\n\n"), content("look: "), call(0, "{", "f"), call(0, "}"), call(1, "[]", "g")]
    parts, steps = run(pieces)
    assert shown(parts) == [("thought", "", "hm"), ("text", "", "\n\nlook: "), ("call", "f", "{}"), ("call", "g", "[]")]
    assert [(step.part.index, step.what) for step in steps if step.what != "grows"] == [
        (i, what) for i in range(4) for what in ("begins", "ends")
    ]
    assert [part.call_id for part in parts] == ["", "", "call_0", "call_1"]


def test_white_space_alone_is_no_text_but_where_there_is_nothing_else():
    parts, _ = run([thought("hm"), content("\n"), call(0, "", "f"), content(" \n")])
    assert [part.kind for part in parts] == [PartKind.THOUGHT, PartKind.CALL]
    assert shown(run([content("\n"), content(" ")])[0]) == [("text", "", "\n ")]
    assert shown(run([thought("hm"), content("\n")])[0]) == [("thought", "", "hm"), ("text", "", "\n")]
    assert run([]) == ([], [])
    assert shown(run([call(0, "", "f"), content("\n"), content("x")])[0])[1] == ("text", "", "\nx")


letters = st.text(alphabet="ab \n", max_size=4)
piece = st.one_of(letters.map(content), letters.map(thought))


@given(st.lists(piece, max_size=12))
def test_steps_and_parts_say_the_same_and_nothing_but_white_space_is_lost(pieces):
    parts, steps = run(pieces)
    grown = ["".join(step.text for step in steps if step.part is part and step.what == "grows") for part in parts]
    assert grown == [part.text for part in parts]
    open_parts: list[Part] = []
    for step in steps:
        if step.what == "begins":
            assert not open_parts
            open_parts.append(step.part)
        else:
            assert open_parts == [step.part]
            if step.what == "ends":
                open_parts.pop()
    assert not open_parts
    for kind, of in ((PartKind.TEXT, "content"), (PartKind.THOUGHT, "reasoning")):
        told = "".join(part.text for part in parts if part.kind is kind)
        meant = "".join(getattr(one, of) for one in pieces)
        assert told.split() == meant.split() or "".join(told.split()) == "".join(meant.split())
    assert bool(parts) == any(not one.is_empty for one in pieces)
