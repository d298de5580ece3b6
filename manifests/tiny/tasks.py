"""Questions about the calendar, units and other facts, and the table of all kinds of questions. Each kind is a function
that draws from a seeded `random.Random`; the tables and the ways to ask are in texts.json. Knows nothing about chat
messages or tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from letters import LETTERS, counted_down
from structured import JSON_FREE
from sums import NUMBERS, SUMS, counting, table
from texts import (
    CAPITALS,
    CATEGORIES,
    COLOURS,
    DAYS,
    FORMS,
    GREETINGS,
    IRREGULAR,
    LEGS,
    MONTH_DAYS,
    MONTHS,
    NUMBER_WORDS,
    OPPOSITES,
    ORDINALS,
    PAST,
    PLURALS,
    POLITE,
    SEASONS,
    SOUNDS,
    THANKS,
    UNITS,
    YOUNG,
)
from vocabulary import article


def plural(noun: str, n: int = 2) -> str:
    return noun if n == 1 else IRREGULAR.get(noun, noun + "s")


def joined(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


Pair = tuple[str, str]


def calendar(r: random.Random) -> Pair:
    names, kind = r.choice([(DAYS, "day"), (MONTHS, "month")])
    i, n = r.randrange(len(names)), r.randint(2, 5)
    name, after, before, far = names[i], names[(i + 1) % len(names)], names[i - 1], names[(i + n) % len(names)]
    choice = r.randrange(9)
    if choice < 2:
        q = r.choice(FORMS["calendar: what comes after"])
        return q.format(k=kind, x=name), f"After {name} comes {after}."
    if choice < 4:
        q = r.choice(FORMS["what comes before"])
        return q.format(k=kind, x=name), f"Before {name} comes {before}."
    if choice == 4:
        if kind == "day" and r.random() < 0.5:
            return r.choice(
                [f"Today is {name}. What day is tomorrow?", f"If today is {name}, what day is it tomorrow?"]
            ), f"Tomorrow is {after}."
        if kind == "day":
            return r.choice(
                [f"Today is {name}. What day was yesterday?", f"If today is {name}, what day was yesterday?"]
            ), f"Yesterday was {before}."
        q = f"How many days does {name} have?" if r.random() < 0.5 else f"How many days are in {name}?"
        return q, f"{name} has {MONTH_DAYS[i]} days."
    if choice == 5:
        q = r.choice([f"What {kind} is {n} {kind}s after {name}?", f"Which {kind} comes {n} {kind}s after {name}?"])
        way = counted_down([names[(i + j) % len(names)] for j in range(1, n + 1)])
        return q, f"{way}. {n} {kind}s after {name} is {far}."
    if choice == 6:
        of = "week" if kind == "day" else "year"
        return r.choice(
            [f"What is the {ORDINALS[i]} {kind} of the {of}?", f"Which {kind} is the {ORDINALS[i]} of the {of}?"]
        ), f"The {ORDINALS[i]} {kind} of the {of} is {name}."
    if choice == 7 and kind == "day":
        q = r.choice([f"Is {name} a weekend day?", f"Is {name} on the weekend?"])
        return q, f"Yes, {name} is a weekend day." if i > 4 else f"No, {name} is a weekday."
    if r.random() < 0.3:
        j = r.randrange(4)
        return f"What season comes after {SEASONS[j]}?", f"After {SEASONS[j]} comes {SEASONS[(j + 1) % 4]}."
    return r.choice(
        [
            f"List the {kind}s of the {'week' if kind == 'day' else 'year'}.",
            f"Name all the {kind}s.",
            f"What are the {kind}s of the {'week' if kind == 'day' else 'year'}?",
        ]
    ), ", ".join(names) + "."


def units(r: random.Random) -> Pair:
    big, small, k = r.choice(UNITS)
    n = r.choice([1, 1, *range(2, 11)])
    if n == 1:
        q = r.choice(FORMS["how many are in"])
        an = {"hour": "an hour", "euro": "a euro"}.get(big, article(big))
        return q.format(s=plural(small), b=an), f"There are {k} {plural(small)} in {an}."
    q = r.choice(FORMS["how many are"])
    return q.format(s=plural(small), b=plural(big), n=n), f"{n} {plural(big)} are {n * k} {plural(small)}."


def facts(r: random.Random) -> Pair:
    kind = r.randrange(13)
    if kind < 4:
        country, city = r.choice(list(CAPITALS.items()))
        if kind == 3:
            return r.choice(FORMS["is the capital"]).format(c=city), f"{city} is the capital of {country}."
        q = r.choice(FORMS["what is the"])
        return q.format(c=country), f"The capital of {country} is {city}."
    if kind == 4:
        thing, colour = r.choice(list(COLOURS.items()))
        q = r.choice([f"What colour is {thing}?", f"What color is {thing}?", f"Which colour does {thing} have?"])
        return q, f"{thing[0].upper()}{thing[1:]} is {colour}."
    if kind == 5:
        a, s = r.choice(list(SOUNDS.items()))
        return r.choice(
            [f"What sound does {article(a)} make?", f"What does {article(a)} say?", f"How does {article(a)} sound?"]
        ), f"{article(a).capitalize()} says {s}."
    if kind == 6:
        a, n = r.choice(list(LEGS.items()))
        return r.choice(
            [f"How many legs does {article(a)} have?", f"How many legs has {article(a)}?"]
        ), f"{article(a).capitalize()} has {n or 'no'} legs."
    if kind == 7:
        a, y = r.choice(list(YOUNG.items()))
        return r.choice(
            [f"What is a baby {a} called?", f"What do you call a young {a}?", f"What's a baby {a}?"]
        ), f"A young {a} is called a {y}."
    if kind == 8:
        w, o = r.choice(list(OPPOSITES.items()))
        return r.choice(
            [f"What is the opposite of {w}?", f"Opposite of {w}?", f"What's the opposite of {w}?"]
        ), f"The opposite of {w} is {o}."
    if kind == 9:
        w, o = r.choice(list(PLURALS.items()))
        return r.choice([f"What is the plural of {w}?", f"Plural of {w}?"]), f"The plural of {w} is {o}."
    if kind == 10:
        w, o = r.choice(list(PAST.items()))
        return r.choice(
            [f"What is the past tense of {w}?", f"What is the past of {w}?"]
        ), f"The past tense of {w} is {o}."
    if kind == 11:
        word, source = r.choice([("hello", GREETINGS), ("thank you", THANKS)])
        language, said = r.choice(list(source.items()))
        return r.choice(
            [
                f"How do you say {word} in {language}?",
                f'What is "{word}" in {language}?',
                f"Translate {word} to {language}.",
            ]
        ), f'In {language}, {word} is "{said}".'
    category, members = r.choice(list(CATEGORIES.items()))
    if r.random() < 0.5:
        m = r.choice(members.split())
        single = {"countries": "country"}.get(category, category[:-1])
        q = r.choice([f"What is {m}: a fruit, an animal or something else?", f"What kind of thing is {m}?"])
        return q, f"{m[0].upper()}{m[1:]} is {article(single)}."
    n = r.randint(2, 5)
    return r.choice(FORMS["name"]).format(n=r.choice([n, NUMBER_WORDS[n]]), c=category), joined(
        members.split()[:n]
    ) + "."


def casual(r: random.Random, question: str, lower: bool = True) -> str:
    """The same question as a hurried or a polite user types it."""
    question = r.choice(POLITE).replace("{}", question)
    if lower and r.random() < 0.08 and '"' not in question:
        question = question.lower()
    if r.random() < 0.1:
        question = question.rstrip("?.!")
    return question


QUESTIONS: dict[str, list[tuple[Callable[[random.Random], Pair], float]]] = {
    "arithmetic": SUMS,
    "numbers": NUMBERS,
    "counting": [(counting, 2.5)],
    "table": [(table, 0.7)],
    "calendar": [(calendar, 2.0)],
    "words": LETTERS,
    "units": [(units, 1.0)],
    "facts": [(facts, 3.0)],
    "json_answer": JSON_FREE,
}


def arithmetic(r: random.Random) -> Pair:
    return r.choices([make for make, _ in SUMS], [weight for _, weight in SUMS])[0](r)


def pair(r: random.Random) -> Pair:
    """A question of any of these kinds."""
    kinds = [kind for some in QUESTIONS.values() for kind in some]
    return r.choices([make for make, _ in kinds], [weight for _, weight in kinds])[0](r)
