"""All kinds of training documents of the tiny model and their mix.

Every document is made here by templates from a seeded `random.Random`; nothing is downloaded. Knows nothing about the
model or the optimiser.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import letters
import structured
from dialogue import Doc, assistant, user
from mix import Mix
from stories import story, story_about, story_text
from talk import SYSTEM, TALK, recalled, thought_other, thought_problem, thought_sum, turns
from tasks import QUESTIONS, Pair, arithmetic, calendar, casual, facts
from texts import FORMS, PROSE
from tools import tools, tools_unused
from vocabulary import PIECES, quantity, word

Maker = Callable[[random.Random], Doc]
# Their text goes to the end of the question, where nothing may be added or cut off.
VERBATIM = {
    *(letters.repeat, letters.spell_some, letters.word_at, letters.word_count, letters.read_letters),
    *(structured.json_items, structured.json_record, structured.json_person, structured.json_schema),
}


def asked(task: str, make: Callable[[random.Random], Pair], is_held: bool = False) -> Maker:
    """Documents of one question and its answer."""

    def question(r: random.Random) -> Doc:
        q, a = make(r)
        if make not in VERBATIM and not is_held:
            q = casual(r, q, lower=task not in ("words", "json_answer"))
        return Doc(task, [user(q), assistant(a)], exact=True, held=is_held)

    return question


def prose(r: random.Random) -> Doc:
    return Doc("prose", text=r.choice(PROSE))


def raw(r: random.Random) -> Doc:
    """Text without a chat frame: stories, lists and facts, for the completions endpoint."""
    kind = r.randrange(4)
    if kind == 0:
        return Doc("raw", text=story_text(r, r.choice([10, 20, 40])))
    if kind == 1:
        return Doc("raw", text=", ".join(str(i) for i in range(1, r.randint(20, 200))))
    if kind == 2:
        return Doc("raw", text=" ".join(facts(r)[1] for _ in range(r.randint(1, 6))))
    pairs = (r.choice([arithmetic, calendar, facts])(r) for _ in range(r.randint(2, 6)))
    return Doc("raw", text="\n".join(f"Q: {q}\nA: {a}" for q, a in pairs))


def echoes(r: random.Random) -> Doc:
    """Text that says the same again: to copy is the first thing to learn."""
    pool = [
        r.choice([word, lambda r: str(quantity(r)), lambda r: r.choice(PIECES)])(r) for _ in range(r.randint(3, 24))
    ]
    joint = r.choice([" ", ", ", "\n", "-"])
    return Doc("raw", text=joint.join(pool * r.choice([2, 2, 3])))


def long_count(r: random.Random) -> Doc:
    """Answers of some hundred tokens, so that long generations stay sensible."""
    n = r.choice([50, 60, 80, 100, 100, 120, 150, r.randint(40, 200)])
    q = r.choice(FORMS["long_list: count to"]).format(n=n)
    return Doc("long", [user(q), assistant(", ".join(map(str, range(1, n + 1))) + ".")], exact=True)


def long_tables(r: random.Random) -> Doc:
    """Which tables there are is said first: after the last of them comes nothing."""
    top = r.randint(3, 10)
    q = r.choice(FORMS["write the times tables"]).format(t=top)
    tables = range(2, top + 1)
    lines = "\n".join(f"{a} × {b} = {a * b}" for a in tables for b in range(1, 11))
    return Doc("long", [user(q), assistant(f"{', '.join(map(str, tables))}:\n{lines}")], exact=True)


def named(room: str, make: Callable[..., object]) -> str:
    return room if make.__name__ == room else f"{room}/{make.__name__}"


SHARES = {
    "arithmetic": 14.0,
    "numbers": 8.0,
    "counting": 4.0,
    "table": 0.8,
    "calendar": 4.0,
    "words": 20.0,
    "units": 1.5,
    "facts": 4.0,
    "json_answer": 8.0,
}  # of all documents, in hundredths, while many of their answers are wrong


def kinds() -> dict[str, tuple[Maker, float]]:
    """Every kind by its name, and its weight."""
    out: dict[str, tuple[Maker, float]] = {}
    for task, members in QUESTIONS.items():
        whole = sum(weight for _, weight in members)
        for make, weight in members:
            out[named(task, make)] = asked(task, make), SHARES[task] * weight / whole
    for make, weight in structured.JSON_HELD:
        out[named("schema", make)] = asked("schema", make, is_held=True), weight
    for room, some in (("talk", TALK), ("system", SYSTEM)):
        for maker, weight in some:
            out[named(room, maker)] = maker, weight
    plain = [(turns, 6.0), (recalled, 2.0), (thought_sum, 4.0), (thought_problem, 2.0), (thought_other, 1.0),
             (tools, 12.0), (tools_unused, 1.5), (story, 0.6), (story_about, 1.2), (prose, 0.4), (raw, 1.0),
             (echoes, 2.0), (long_count, 0.5), (long_tables, 0.4)]  # fmt: skip
    return out | {maker.__name__: (maker, weight) for maker, weight in plain}


KINDS = kinds()


# Kinds of which many answers are right, so that hardly one is just what was expected.
OPEN = {"talk/small_talk", "talk/joke", "thought_other", "story", "story_about", "prose", "raw", "echoes"}


def weights(mix: Mix) -> list[float]:
    """How often each of KINDS is drawn: its weight by its share of the mix, the OPEN ones by the mean share of the
    others, and as many times as often as the mix was asked for."""
    shares = {kind: mix.share(kind) for kind in KINDS if kind not in OPEN}
    mean = sum(KINDS[kind][1] * share for kind, share in shares.items()) / sum(KINDS[kind][1] for kind in shares)
    return [weight * shares.get(kind, mean) * mix.more.get(kind, 1.0) for kind, (_, weight) in KINDS.items()]


def document(r: random.Random, mix: Mix) -> Doc:
    kind = r.choices(list(KINDS), weights(mix))[0]
    doc = KINDS[kind][0](r)
    doc.kind = kind
    return doc


def held_out(doc: Doc) -> bool:
    """Whether a document is kept from training: a twentieth of all, by a hash of its text, so that both sides agree
    without a list."""
    return zlib.crc32(doc.render().encode()) % 20 == 0
