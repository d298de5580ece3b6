"""Questions and answers of the tiny model's training dialogues, one function a kind. Each draws from a seeded
`random.Random`; the tables and the ways to ask are in texts.json. Knows nothing about chat messages or tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from texts import (
    ADD,
    CAPITALS,
    CATEGORIES,
    COLOURS,
    DAYS,
    DIV,
    FORMS,
    GREETINGS,
    IRREGULAR,
    LEGS,
    MONTH_DAYS,
    MONTHS,
    MUL,
    NAMES,
    NUMBER_WORDS,
    OPPOSITES,
    ORDINALS,
    PAST,
    PLURALS,
    POLITE,
    SEASONS,
    SOUNDS,
    SUB,
    THANKS,
    THINGS,
    UNITS,
    WORDS,
    YOUNG,
)


def plural(noun: str, n: int = 2) -> str:
    return noun if n == 1 else IRREGULAR.get(noun, noun + "s")


def joined(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


Pair = tuple[str, str]


def number(r: random.Random) -> int:
    """An operand, small ones the more often."""
    return r.randint(0, r.choice([10, 10, 20, 50, 100, 100]))


def sum_parts(r: random.Random) -> tuple[str, str, int]:
    """Question, equation without its result, result."""
    kind = r.choices("+-*/", [5, 3, 3, 1])[0]
    if kind == "+":
        a, b = number(r), number(r)
        return r.choice(ADD).format(a=a, b=b), f"{a} + {b}", a + b
    if kind == "-":
        a, b = sorted((number(r), number(r)), reverse=True)
        return r.choice(SUB).format(a=a, b=b), f"{a} - {b}", a - b
    a, b = r.randint(0, 12), r.randint(1, 12)
    if kind == "*":
        return r.choice(MUL).format(a=a, b=b), f"{a} × {b}", a * b
    return r.choice(DIV).format(a=a * b, b=b), f"{a * b} / {b}", a


def arithmetic(r: random.Random) -> Pair:
    if r.random() < 0.08:
        a, b = r.randint(0, 10), r.randint(0, 10)
        return f"What is {NUMBER_WORDS[a]} {r.choice(['plus', 'and'])} {NUMBER_WORDS[b]}?", f"{a} + {b} = {a + b}."
    if r.random() < 0.06:
        a, b, c = (r.randint(0, 20) for _ in range(3))
        return r.choice(["What is {0} + {1} + {2}?", "{0} + {1} + {2}", "Add {0}, {1} and {2}."]).format(
            a, b, c
        ), f"{a} + {b} + {c} = {a + b + c}."
    question, equation, result = sum_parts(r)
    return question, f"{equation} = {result}."


def numbers(r: random.Random) -> Pair:
    a, b = r.sample(range(0, r.choice([20, 100, 100, 1000])), 2)
    kind = r.randrange(8)
    if kind == 0:
        q = r.choice(FORMS["which is larger"])
        return q.format(a=a, b=b), f"{max(a, b)} is larger than {min(a, b)}."
    if kind == 1:
        q = r.choice(FORMS["which is smaller"])
        return q.format(a=a, b=b), f"{min(a, b)} is smaller than {max(a, b)}."
    if kind == 2:
        return r.choice(FORMS["is even or"]).format(a=a), f"{a} is {'odd' if a % 2 else 'even'}."
    if kind == 3:
        return r.choice(FORMS["what comes after"]).format(a=a), f"After {a} comes {a + 1}."
    if kind == 4:
        return r.choice(["What comes before {a}?", "What number comes before {a}?"]).format(
            a=a + 1
        ), f"Before {a + 1} comes {a}."
    if kind == 5:
        n = r.randint(1, 50)
        return r.choice(["What is double {n}?", "Double {n}.", "What is twice {n}?"]).format(
            n=n
        ), f"Double {n} is {2 * n}."
    if kind == 6:
        n = r.randint(1, 50)
        return r.choice(["What is half of {n}?", "Halve {n}.", "What is a half of {n}?"]).format(
            n=2 * n
        ), f"Half of {2 * n} is {n}."
    few = r.sample(range(100), r.randint(3, 5))
    listed = ", ".join(map(str, few))
    in_order = ", ".join(map(str, sorted(few)))
    return r.choice(
        [
            (f"Sort these numbers: {listed}", in_order),
            (f"Put in order: {listed}", in_order),
            (f"What is the largest of {listed}?", f"The largest is {max(few)}."),
            (f"What is the smallest of {listed}?", f"The smallest is {min(few)}."),
        ]
    )


def counting(r: random.Random, longest: int = 40) -> Pair:
    step = r.choice([1, 1, 1, 1, 2, 5, 10])
    start = r.choice([1, 1, 1, r.randint(0, 90)]) if step == 1 else step
    n = r.randint(2, longest)
    stop = start + step * (n - 1)
    items = [str(i) for i in range(start, stop + 1, step)]
    if step > 1:
        q = r.choice(FORMS["count by s"])
    elif start == 1 and r.random() < 0.6:
        q = r.choice(FORMS["count to"])
    elif r.random() < 0.2:
        q, items = r.choice(FORMS["count down from"]), items[::-1]
    else:
        q = r.choice(FORMS["count from to"])
    return q.format(step=step, start=start, stop=stop), ", ".join(items) + "."


def table(r: random.Random) -> Pair:
    n, top = r.randint(2, 12), r.choice([5, 10, 10, 12])
    q = r.choice(FORMS["write the times"])
    return q.format(n=n, top=top), "\n".join(f"{n} × {i} = {n * i}" for i in range(1, top + 1))


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
        return q, f"{n} {kind}s after {name} is {far}."
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


def words(r: random.Random) -> Pair:
    w = r.choice(WORDS)
    kind = r.randrange(9)
    if kind < 3:
        return r.choice(FORMS["spell"]).format(w=w), "-".join(w) + "."
    if kind == 3:
        return r.choice(FORMS["reverse the word"]).format(w=w), f"{w[::-1]}"
    if kind == 4:
        return r.choice(FORMS["write in capital"]).format(w=w), w.upper()
    if kind == 5:
        return r.choice(FORMS["how many letters"]).format(w=w), f"The word {w} has {len(w)} letters."
    if kind == 6:
        which, letter = r.choice([("first", w[0]), ("last", w[-1])])
        return r.choice(
            [f"What is the {which} letter of {w}?", f"What's the {which} letter in {w}?"]
        ), f"The {which} letter of {w} is {letter}."
    if kind == 7:
        i = r.randrange(26)
        abc = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        if r.random() < 0.3:
            return r.choice(FORMS["say the alphabet"]), ", ".join(abc) + "."
        if i == 25:
            return "What letter comes before Z?", "Before Z comes Y."
        return f"What letter comes after {abc[i]}?", f"After {abc[i]} comes {abc[i + 1]}."
    some = " ".join(r.choice(WORDS) for _ in range(r.randint(1, 8)))
    return r.choice(FORMS["repeat"]).format(s=some), some


def units(r: random.Random) -> Pair:
    big, small, k = r.choice(UNITS)
    n = r.choice([1, 1, 2, 3, 4, 5, 6, 8, 10])
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


def json_answer(r: random.Random) -> Pair:
    kind = r.randrange(5)
    if kind < 2:
        q, _, result = sum_parts(r)
        return r.choice(FORMS["answer in json"]).format(q=q), json.dumps({"answer": result})
    name, age, city = r.choice(NAMES), r.randint(2, 90), r.choice(list(CAPITALS.values()))
    if kind == 2:
        return r.choice(
            [
                f"{name} is {age} years old and lives in {city}. Extract name, age and city as JSON.",
                f"Give me a JSON object with the name {name}, the age {age} and the city {city}.",
                f"Turn this into JSON: {name} is {age} years old and lives in {city}.",
            ]
        ), json.dumps({"name": name, "age": age, "city": city})
    if kind == 3:
        category, members = r.choice(list(CATEGORIES.items()))
        n = r.randint(2, 4)
        return r.choice([f"Give me {n} {category} as a JSON list.", f"List {n} {category} in JSON."]), json.dumps(
            {category: members.split()[:n]}
        )
    country, city = r.choice(list(CAPITALS.items()))
    return r.choice(
        [f"Answer in JSON: what is the capital of {country}?", f"What is the capital of {country}? Answer in JSON."]
    ), json.dumps({"country": country, "capital": city})


def word_problem(r: random.Random) -> tuple[str, str, str]:
    """Question, thought, answer."""
    name, thing, a, b = r.choice(NAMES), r.choice(THINGS), r.randint(2, 40), r.randint(1, 30)
    kind = r.randrange(3)
    if kind == 0:
        q = r.choice(FORMS["has and gets"])
        return (
            q.format(n=name, a=a, b=b, t=thing),
            f"{name} starts with {a} and gets {b} more. {a} + {b} = {a + b}.",
            f"{name} has {a + b} {thing}.",
        )
    if kind == 1:
        a, b = max(a, b), min(a, b)
        q = r.choice(FORMS["has and gives"])
        return (
            q.format(n=name, a=a, b=b, t=thing),
            f"{name} starts with {a} and has {b} fewer. {a} - {b} = {a - b}.",
            f"{name} has {a - b} {thing}.",
        )
    a, b = r.randint(2, 10), r.randint(2, 10)
    return (
        f"{name} has {a} boxes with {b} {thing} in each. How many {thing} are there in all?",
        f"There are {a} boxes with {b} each. {a} × {b} = {a * b}.",
        f"{name} has {a * b} {thing}.",
    )


def long_sum(r: random.Random) -> tuple[str, str, str]:
    a, b = r.randint(10, 499), r.randint(10, 499)
    steps, carry, result = [], 0, a + b
    for place, name in ((1, "Ones"), (10, "Tens"), (100, "Hundreds")):
        x, y = a // place % 10, b // place % 10
        if place > max(a, b):
            break
        total = x + y + carry
        steps.append(f"{name}: {x} + {y}{' + 1' if carry else ''} = {total}.")
        carry = total // 10
    return r.choice(ADD).format(a=a, b=b), " ".join(steps) + f" So {a} + {b} = {result}.", f"{a} + {b} = {result}."


def casual(r: random.Random, question: str) -> str:
    """The same question as a hurried or a polite user types it."""
    question = r.choice(POLITE).format(question)
    if r.random() < 0.08 and '"' not in question:
        question = question.lower()
    if r.random() < 0.1:
        question = question.rstrip("?.!")
    return question


QUESTIONS: list[tuple[Callable[[random.Random], Pair], float]] = [
    (arithmetic, 6),
    (numbers, 2.5),
    (counting, 2.5),
    (table, 0.5),
    (calendar, 3),
    (words, 4),
    (units, 1.5),
    (facts, 4.5),
    (json_answer, 2),
]


def pair(r: random.Random) -> tuple[str, Pair]:
    make = r.choices([q for q, _ in QUESTIONS], [w for _, w in QUESTIONS])[0]
    return make.__name__, make(r)
