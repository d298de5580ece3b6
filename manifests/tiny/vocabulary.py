"""Words, names and numbers that documents speak of: known ones, those of the prose, and made-up ones, so that what is
asked about has to be read and cannot be known by heart."""

from __future__ import annotations

import json
import pathlib
import random
import re

from texts import ABOUT, CAPITALS, NAMES, PROSE, WORDS

_tokens = json.loads((pathlib.Path(__file__).parent / "tokenizer.json").read_text())["model"]["vocab"]
# What single tokens spell: only of whole tokens can be learned which letters they have.
PIECES = sorted({t.removeprefix("Ġ") for t in _tokens if re.fullmatch("Ġ?[a-z]{2,9}", t)})
SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
READ = sorted({w.lower() for t in (*PROSE, *ABOUT.values()) for w in re.findall(r"[A-Za-z]{2,12}", t)} - {*WORDS})


def word(r: random.Random) -> str:
    """A lower-case word: known, of the prose, of one token, of some, or of syllables."""
    kind = r.randrange(10)
    if kind < 4:
        return r.choice(WORDS)
    if kind < 6:
        return r.choice(READ)
    if kind < 7:
        return r.choice(PIECES)
    if kind < 9:
        return "".join(r.choice(PIECES) for _ in range(r.choice([2, 2, 2, 3])))[:12]
    return "".join(r.choice(SYLLABLES) for _ in range(r.randint(2, 4))) + r.choice(["", "n", "r", "s", "t", "l"])


def name(r: random.Random) -> str:
    """A person's name, made up every second time."""
    if r.random() < 0.5:
        return r.choice(NAMES)
    if r.random() < 0.3:
        return "".join(r.choice(PIECES) for _ in range(2))[:9].capitalize()
    return ("".join(r.choice(SYLLABLES) for _ in range(r.choice([2, 2, 3]))) + r.choice(["", "n", "r"])).capitalize()


def city(r: random.Random) -> str:
    """A city, made up now and then."""
    return r.choice(list(CAPITALS.values())) if r.random() < 0.6 else name(r)


def phrase(r: random.Random, longest: int = 6) -> str:
    """Some words in a row."""
    return " ".join(word(r) for _ in range(r.randint(1, longest)))


def quantity(r: random.Random) -> int:
    """A whole number of up to four digits, short ones the more often."""
    return r.randint(0, r.choice([9, 20, 99, 99, 999, 9999]))


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun
