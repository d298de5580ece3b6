"""Questions about words and their letters: spelling, turning round, counting, repeating. One function a kind."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Sequence

from dialogue import letterwise, unmarked
from texts import FORMS
from vocabulary import PIECES, name, phrase, quantity, word

Pair = tuple[str, str]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]


def spelled(w: str) -> str:
    return "-".join(w)


def numbered(parts: Iterable[str]) -> str:
    """1 s, 2 u, 3 n."""
    return ", ".join(f"{i} {part}" for i, part in enumerate(parts, 1))


def counted_down(parts: Sequence[str]) -> str:
    """3 s, 2 u, 1 n: where the number of parts was asked for, it is said first, and one is the end of them."""
    return ", ".join(f"{len(parts) - i} {part}" for i, part in enumerate(parts))


def upper(text: str) -> str:
    """In capital letters, each of which is a token: few words in capitals have tokens of more."""
    return re.sub(r"[^\W\d_]+", lambda letters: letterwise(letters[0]), unmarked(text).upper())


def some(r: random.Random) -> str:
    """A word, or a name."""
    return word(r) if r.random() < 0.85 else name(r)


def spell(r: random.Random) -> Pair:
    w = some(r)
    return r.choice(FORMS["spell"]).format(w=w), letterwise(spelled(w)) + "."


def spell_some(r: random.Random) -> Pair:
    """Several words in one answer, most of them single tokens: what letters a token has is learned fastest so."""
    ws = [r.choice(PIECES) if r.random() < 0.6 else some(r) for _ in range(r.randint(2, 6))]
    q = r.choice(["Spell these words: {}", "Spell each word: {}", "Spell: {}", "How are these spelled: {}"])
    return q.format(", ".join(ws)), ", ".join(letterwise(spelled(w)) for w in ws) + "."


def read_letters(r: random.Random) -> Pair:
    """The other way: letters to a word."""
    w = some(r)
    q = r.choice(["Which word is {}?", "What word is spelled {}?", "Put these letters together: {}"])
    return q.format(spelled(w)), f"The word is {letterwise(w)}."


def backwards(r: random.Random) -> Pair:
    w = some(r)
    q = r.choice(FORMS["reverse the word"]).format(w=w)
    return q, f"{letterwise(spelled(w))} backwards is {letterwise(spelled(w[::-1]))}."


def capitals(r: random.Random) -> Pair:
    w = some(r) if r.random() < 0.8 else phrase(r, 3)
    return r.choice(FORMS["write in capital"]).format(w=w), upper(w)


def letter_count(r: random.Random) -> Pair:
    w = some(r)
    return r.choice(FORMS["how many letters"]).format(w=w), f"{numbered(w)}. The word {w} has {len(w)} letters."


def one_letter_count(r: random.Random) -> Pair:
    """How often a letter is in a word, which is spelled first, its occurrences numbered; the last number recurs."""
    w = word(r)
    letter = r.choice(w) if r.random() < 0.85 else r.choice("abcdefghijklmnopqrstuvwxyz")
    n = w.count(letter)
    q = r.choice(
        [
            "How many times is the letter {x} in {w}?",
            "How many {x}'s are in {w}?",
            "How many {x}s are in the word {w}?",
            "Count the letter {x} in {w}.",
            "How often does {w} have the letter {x}?",
        ]
    )
    places = itertools.count(1)
    parts = [f"{x} {next(places)}" if x == letter else x for x in w]
    times = {0: f"not in {w}", 1: f"in {w} once", 2: f"in {w} twice"}.get(n, f"in {w} {n} times")
    return q.format(x=letter, w=w), f"{', '.join(parts)}: {n}. The letter {letter} is {times}."


def letter_at(r: random.Random) -> Pair:
    w = some(r)
    i = r.choice([0, 0, -1, -1, r.randrange(min(len(w), 6))])
    which = "last" if i < 0 else ORDINALS[i]
    q = r.choice(["What is the {i} letter of {w}?", "What's the {i} letter in {w}?", "Which letter of {w} is the {i}?"])
    way = numbered(w) if i < 0 else counted_down(w[: i + 1])
    return q.format(i=which, w=w), f"{way}. The {which} letter of {w} is {w[i]}."


def alphabet(r: random.Random) -> Pair:
    abc = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    kind = r.randrange(5)
    if kind == 0:
        return r.choice(FORMS["say the alphabet"]), ", ".join(abc) + "."
    i = r.randrange(25)
    if kind < 3:
        return f"What letter comes after {abc[i]}?", f"After {abc[i]} comes {abc[i + 1]}."
    return f"What letter comes before {abc[i + 1]}?", f"Before {abc[i + 1]} comes {abc[i]}."


def repeat(r: random.Random) -> Pair:
    """Words, numbers, names, or pieces that make no word, as they were given."""
    kind = r.randrange(5)
    if kind < 2:
        text = phrase(r, 8)
    elif kind == 2:
        text = " ".join(r.choice([str(quantity(r)), word(r), name(r)]) for _ in range(r.randint(1, 6)))
    elif kind == 3:
        text = "".join(r.choice(PIECES) for _ in range(r.randint(2, 7)))
    else:
        text = phrase(r, 7).capitalize() + r.choice([".", "!", "?"])
    return r.choice(FORMS["repeat"]).format(s=text), text


def repeat_often(r: random.Random) -> Pair:
    w, n = r.choice([some(r), str(quantity(r))]), r.randint(2, 5)
    q = r.choice(["Write {w} {n} times.", "Say {w} {n} times.", "Repeat the word {w} {n} times."])
    return q.format(w=w, n=n), " ".join([w] * n)


def word_at(r: random.Random) -> Pair:
    """A word out of a list by its place."""
    ws = [word(r) for _ in range(r.randint(2, 6))]
    i = r.randrange(len(ws))
    which = r.choice(["last", ORDINALS[i]]) if i == len(ws) - 1 else ORDINALS[i]
    q = r.choice(["What is the {i} word of: {s}", 'Which word is the {i} in "{s}"?', "The {i} word of this: {s}"])
    way = numbered(ws) if which == "last" else counted_down(ws[: i + 1])
    return q.format(i=which, s=" ".join(ws)), f"{way}. The {which} word is {ws[i]}."


def word_count(r: random.Random) -> Pair:
    ws = [word(r) for _ in range(r.randint(1, 9))]
    q = r.choice(["How many words are in: {s}", "Count the words: {s}", 'How many words does "{s}" have?'])
    whole = "There is 1 word." if len(ws) == 1 else f"There are {len(ws)} words."
    return q.format(s=" ".join(ws)), f"{numbered(ws)}. {whole}"


LETTERS = [
    (spell, 3.0),
    (spell_some, 3.0),
    (read_letters, 1.0),
    (backwards, 1.5),
    (capitals, 1.0),
    (letter_count, 1.5),
    (one_letter_count, 1.5),
    (letter_at, 1.0),
    (alphabet, 0.5),
    (repeat, 3.0),
    (repeat_often, 1.0),
    (word_at, 1.0),
    (word_count, 1.0),
]
