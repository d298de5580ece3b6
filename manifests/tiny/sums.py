"""Questions about numbers: sums, comparisons, counting, tables, and sums that are thought over. One function a kind."""

from __future__ import annotations

import random
from collections.abc import Sequence

from texts import ADD, DIV, FORMS, MUL, NUMBER_WORDS, SUB, THINGS
from vocabulary import name

Pair = tuple[str, str]
PLACES = ((1, "Ones"), (10, "Tens"), (100, "Hundreds"))


def number(r: random.Random) -> int:
    """An operand, small ones the more often."""
    return r.randint(0, r.choice([10, 10, 20, 50, 100, 100]))


def difference(r: random.Random) -> tuple[int, int]:
    """Two operands, the first not the smaller; near ones often, of all sizes, which two draws seldom are."""
    if r.random() < 0.4:
        a = r.randint(0, 100)
        return a, max(0, a - r.randint(0, r.choice([9, 20])))
    a, b = sorted((number(r), number(r)), reverse=True)
    return a, b


def difference_parts(r: random.Random) -> tuple[str, str, int]:
    """Question, equation without its result, result."""
    a, b = difference(r)
    return r.choice(SUB).format(a=a, b=b), f"{a} - {b}", a - b


def sum_parts(r: random.Random) -> tuple[str, str, int]:
    """Those of a sum, a difference, a product or a quotient."""
    kind = r.choices("+-*/", [5, 3, 3, 1])[0]
    if kind == "+":
        a, b = number(r), number(r)
        return r.choice(ADD).format(a=a, b=b), f"{a} + {b}", a + b
    if kind == "-":
        return difference_parts(r)
    a, b = r.randint(0, 12), r.randint(1, 12)
    if kind == "*":
        return r.choice(MUL).format(a=a, b=b), f"{a} × {b}", a * b
    return r.choice(DIV).format(a=a * b, b=b), f"{a * b} / {b}", a


def added(r: random.Random) -> Pair:
    a, b = number(r), number(r)
    return r.choice(ADD).format(a=a, b=b), f"{a} + {b} = {a + b}."


def subtracted(r: random.Random) -> Pair:
    a, b = difference(r)
    return r.choice(SUB).format(a=a, b=b), f"{a} - {b} = {a - b}."


def multiplied(r: random.Random) -> Pair:
    a, b = r.randint(0, 12), r.randint(1, 12)
    return r.choice(MUL).format(a=a, b=b), f"{a} × {b} = {a * b}."


def divided(r: random.Random) -> Pair:
    a, b = r.randint(0, 12), r.randint(1, 12)
    return r.choice(DIV).format(a=a * b, b=b), f"{a * b} / {b} = {a}."


def sum_by_digits(a: int, b: int) -> str:
    """Ones, tens and hundreds of a sum, each with what the one before carries."""
    steps, carry = [], 0
    for place, label in PLACES:
        x, y = a // place % 10, b // place % 10
        if place > max(a, b):
            break
        total = x + y + carry
        steps.append(f"{label}: {x} + {y}{' + 1' if carry else ''} = {total}.")
        carry = total // 10
    return " ".join(steps)


def difference_by_digits(a: int, b: int) -> str:
    """Ones, tens and hundreds of a - b, a ≥ b: a digit that is too small is said again with the ten that it borrows,
    which the next gives."""
    steps, borrowed = [], 0
    for place, label in PLACES:
        x, y = a // place % 10, b // place % 10
        if place > a:
            break
        less = f" - {y}{' - 1' if borrowed else ''}"
        lacks, given = x < y + borrowed, borrowed
        said = f"{x}{less}, {x + 10}{less}" if lacks else f"{x}{less}"
        steps.append(f"{label}: {said} = {x + 10 * lacks - y - given}.")
        borrowed = int(lacks)
    return " ".join(steps)


def added_long(r: random.Random) -> Pair:
    """With an operand of three digits, digit by digit."""
    a, b = r.randint(0, r.choice([99, 999])), r.randint(0, r.choice([99, 999]))
    said = f"{a} + {b} = {a + b}."
    return r.choice(ADD).format(a=a, b=b), said if max(a, b) < 100 else f"{sum_by_digits(a, b)} So {said}"


def subtracted_long(r: random.Random) -> Pair:
    a, b = sorted((r.randint(0, 999), r.randint(0, r.choice([99, 999]))), reverse=True)
    said = f"{a} - {b} = {a - b}."
    return r.choice(SUB).format(a=a, b=b), said if a < 100 else f"{difference_by_digits(a, b)} So {said}"


def added_words(r: random.Random) -> Pair:
    a, b = r.randint(0, 10), r.randint(0, 10)
    return f"What is {NUMBER_WORDS[a]} {r.choice(['plus', 'and'])} {NUMBER_WORDS[b]}?", f"{a} + {b} = {a + b}."


def added_three(r: random.Random) -> Pair:
    a, b, c = (r.randint(0, 20) for _ in range(3))
    q = r.choice(["What is {0} + {1} + {2}?", "{0} + {1} + {2}", "Add {0}, {1} and {2}."])
    return q.format(a, b, c), f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."


SUMS = [
    (added, 4.0),
    (subtracted, 3.0),
    (multiplied, 2.0),
    (divided, 1.0),
    (added_long, 2.0),
    (subtracted_long, 2.0),
    (added_words, 0.5),
    (added_three, 1.0),
]


def some_number(r: random.Random) -> int:
    return r.randrange(0, r.choice([20, 100, 100, 1000]))


def aligned(numbers: Sequence[int]) -> str:
    """The numbers with as many digits each, where they have not, so that digits can be compared one by one; else
    nothing."""
    lengths = {len(str(n)) for n in numbers}
    return "" if len(lengths) == 1 else ", ".join(f"{n:0{max(lengths)}}" for n in numbers) + ". "


def compared(r: random.Random) -> Pair:
    a, b = r.sample(range(0, r.choice([20, 100, 100, 1000])), 2)
    if r.random() < 0.25:  # close ones, which differ late
        b = a + r.choice([-1, 1, -10, 10, 2]) if a >= 10 else a + 1
    way = aligned((a, b))
    if r.random() < 0.5:
        return r.choice(FORMS["which is larger"]).format(a=a, b=b), f"{way}{max(a, b)} is larger than {min(a, b)}."
    return r.choice(FORMS["which is smaller"]).format(a=a, b=b), f"{way}{min(a, b)} is smaller than {max(a, b)}."


def parity(r: random.Random) -> Pair:
    a = some_number(r)
    return r.choice(FORMS["is even or"]).format(a=a), f"{a} is {'odd' if a % 2 else 'even'}."


def neighbour(r: random.Random) -> Pair:
    a = some_number(r)
    if r.random() < 0.5:
        return r.choice(FORMS["what comes after"]).format(a=a), f"After {a} comes {a + 1}."
    q = r.choice(["What comes before {a}?", "What number comes before {a}?"])
    return q.format(a=a + 1), f"Before {a + 1} comes {a}."


def doubled(r: random.Random) -> Pair:
    n = r.randint(1, 50)
    if r.random() < 0.5:
        q = r.choice(["What is double {n}?", "Double {n}.", "What is twice {n}?"])
        return q.format(n=n), f"Double {n} is {2 * n}."
    q = r.choice(["What is half of {n}?", "Halve {n}.", "What is a half of {n}?"])
    return q.format(n=2 * n), f"Half of {2 * n} is {n}."


def ordered(r: random.Random) -> Pair:
    few = r.sample(range(100), r.randint(3, 5))
    q = r.choice(["Sort these numbers: {}", "Put in order: {}"])
    return q.format(", ".join(map(str, few))), f"{aligned(few)}In order: {', '.join(map(str, sorted(few)))}."


def extreme(r: random.Random) -> Pair:
    few = r.sample(range(r.choice([100, 100, 1000])), r.randint(3, 5))
    listed = ", ".join(map(str, few))
    if r.random() < 0.5:
        return f"What is the largest of {listed}?", f"{aligned(few)}The largest is {max(few)}."
    return f"What is the smallest of {listed}?", f"{aligned(few)}The smallest is {min(few)}."


NUMBERS = [(compared, 3.0), (parity, 1.0), (neighbour, 1.5), (doubled, 1.0), (ordered, 1.5), (extreme, 1.5)]


def counting(r: random.Random, longest: int = 40) -> Pair:
    step = r.choice([1, 1, 1, 1, 2, 5, 10])
    start = r.choice([1, 1, 1, r.randint(0, 90), r.randint(90, 300)]) if step == 1 else step
    n = r.randint(2, r.choice([12, longest]))
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


Thought = tuple[str, str, str]


def word_problem(r: random.Random) -> Thought:
    """Question, thought, answer."""
    who, thing, a, b = name(r), r.choice(THINGS), r.randint(2, 40), r.randint(1, 30)
    kind = r.randrange(3)
    if kind == 0:
        q = r.choice(FORMS["has and gets"]).format(n=who, a=a, b=b, t=thing)
        way = f"{sum_by_digits(a, b)} So " if max(a, b) > 9 else ""
        return q, f"{who} starts with {a} and gets {b} more. {way}{a} + {b} = {a + b}.", f"{who} has {a + b} {thing}."
    if kind == 1:
        a, b = max(a, b), min(a, b)
        q = r.choice(FORMS["has and gives"]).format(n=who, a=a, b=b, t=thing)
        way = f"{difference_by_digits(a, b)} So " if a > 9 else ""
        return q, f"{who} starts with {a} and has {b} fewer. {way}{a} - {b} = {a - b}.", f"{who} has {a - b} {thing}."
    a, b = r.randint(2, 10), r.randint(2, 10)
    return (
        f"{who} has {a} boxes with {b} {thing} in each. How many {thing} are there in all?",
        f"There are {a} boxes with {b} each. {a} × {b} = {a * b}.",
        f"{who} has {a * b} {thing}.",
    )


def long_sum(r: random.Random) -> Thought:
    """A sum digit by digit: question, thought, answer."""
    a, b = r.randint(10, r.choice([99, 499, 999])), r.randint(10, r.choice([99, 499, 999]))
    said = f"{a} + {b} = {a + b}."
    return r.choice(ADD).format(a=a, b=b), f"{sum_by_digits(a, b)} So {said}", said
