"""Dialogues that are no question of a task: small talk, paragraphs, jokes, code, poems, what the model cannot know,
thoughts, system prompts, several turns. One function a kind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from dialogue import END_THINK, THINK, Doc, assistant, unmarked, user
from letters import upper
from sums import added, long_sum, sum_parts, word_problem
from tasks import QUESTIONS, arithmetic, calendar, casual, facts, pair
from texts import ABOUT, ADD, CODE, DAYS, FORMS, JOKES, SMALL_TALK, UNKNOWN, UNKNOWN_ANSWER
from vocabulary import city, name, quantity, word


def small_talk(r: random.Random) -> Doc:
    asked, answers = r.choice(SMALL_TALK)
    q = casual(r, r.choice(asked)) if r.random() < 0.4 else r.choice(asked)
    return Doc("talk", [user(q), assistant(r.choice(answers))])


def about(r: random.Random) -> Doc:
    topic, text = r.choice(list(ABOUT.items()))
    q = r.choice(FORMS["tell me about"])
    return Doc("about", [user(casual(r, q.format(t=topic))), assistant(text)], exact=True)


def joke(r: random.Random) -> Doc:
    return Doc("talk", [user(r.choice(FORMS["tell me a joke"])), assistant(r.choice(JOKES))])


def code(r: random.Random) -> Doc:
    task, text = r.choice(list(CODE.items()))
    return Doc("code", [user(r.choice(FORMS["write a python"]).format(t=task)), assistant(text)], exact=True)


def poem(r: random.Random) -> Doc:
    thing = r.choice(FORMS["moon"])
    text = (
        f"The {thing} is here, the {thing} is near,\nI see it every day.\n"
        "It makes no sound, it goes around,\nAnd then it slips away.\n\n"
        f"O {thing} so bright, O {thing} so light,\nCome back to us again.\n"
        "We wait for you the whole night through,\nIn sunshine and in rain."
    )
    return Doc("poem", [user(r.choice(FORMS["write a poem"]).format(t=thing)), assistant(text)], exact=True)


def unknown(r: random.Random) -> Doc:
    """An honest answer to what the model cannot know."""
    q = r.choice(UNKNOWN).format(name=name(r), word=word(r), n=r.randint(2, 99))
    return Doc("unknown", [user(casual(r, q)), assistant(UNKNOWN_ANSWER)], exact=True)


TALK: list[tuple[Callable[[random.Random], Doc], float]] = [
    (small_talk, 3),
    (about, 3),
    (joke, 0.5),
    (code, 1.2),
    (poem, 0.6),
    (unknown, 1.5),
]


def thought_over(r: random.Random, task: str, q: str, thought: str, answer: str) -> Doc:
    """Half of them ask for the thought in words; the others stand for a server's thinking switch, where the prompt
    itself opens <think>."""
    asked = r.random() < 0.5
    if asked:
        q = r.choice(FORMS["think step by"]).format(q=q)
    said = assistant(f"{THINK}{thought}{END_THINK}{answer}")
    return Doc(task, [user(q), said], exact=True, thinks=not asked)


def thought_sum(r: random.Random) -> Doc:
    return thought_over(r, "thinking", *long_sum(r))


def thought_problem(r: random.Random) -> Doc:
    return thought_over(r, "thinking", *word_problem(r))


def thought_other(r: random.Random) -> Doc:
    """A thought that only says the question again: which of its last sentences comes is a toss-up."""
    q, answer = r.choice([arithmetic, pair])(r)
    thought = "The question is: " + q + " " + r.choice(["I know this.", "Let me answer.", "That is simple."])
    if len(unmarked(answer)) < 30:
        thought += " " + answer
    made = thought_over(r, "thinking-free", q, thought, answer)
    made.exact = False
    return made


def system_number(r: random.Random) -> Doc:
    q, _, result = sum_parts(r)
    return told(r.choice(FORMS["answer with the"]), q, str(result))


def in_capitals(r: random.Random, *tasks: str) -> Doc:
    """An answer of one of these tasks, unless it is long. Of JSON there is none: the names would be others."""
    members = [member for task in tasks for member in QUESTIONS[task]]
    while True:
        q, a = r.choices([make for make, _ in members], [weight for _, weight in members])[0](r)
        if len(unmarked(a)) <= 60:
            return told(r.choice(["Write everything in capital letters.", "Answer in capital letters."]), q, upper(a))


def system_capitals_facts(r: random.Random) -> Doc:
    """Several kinds of capitals: what is known by heart takes many more of them than what is copied, and whoever
    draws by the share of wrong answers sees them apart."""
    return in_capitals(r, "facts")


def system_capitals_dates(r: random.Random) -> Doc:
    return in_capitals(r, "calendar", "units")


def system_capitals_words(r: random.Random) -> Doc:
    return in_capitals(r, "words")


def system_capitals_sums(r: random.Random) -> Doc:
    return in_capitals(r, "arithmetic", "numbers", "counting", "table")


def system_pirate(r: random.Random) -> Doc:
    q, a = r.choice([arithmetic, calendar, facts])(r)
    return told(r.choice(["You are a pirate.", "Speak like a pirate."]), q, f"Arr! {a}")


def system_name(r: random.Random) -> Doc:
    who = name(r)
    s = r.choice(["Your name is {}.", "You are {}, a friendly assistant.", "You are an assistant called {}."])
    q = r.choice(["What is your name?", "Who are you?", "What are you called?"])
    return told(s.format(who), q, f"My name is {who}.")


def system_json(r: random.Random) -> Doc:
    q, _, result = sum_parts(r)
    s = r.choice(["Answer in JSON.", "Always answer in JSON.", "Reply with JSON."])
    return told(s, q, json.dumps({"answer": result}))


def system_plain(r: random.Random) -> Doc:
    return told(r.choice(FORMS["you are a"]), *pair(r))


def system_fact(r: random.Random) -> Doc:
    """What the system prompt says is asked for."""
    key, value = some_fact(r)
    s = r.choice(["The {k} is {v}.", "You are an assistant. The {k} is {v}.", "Remember: the {k} is {v}."])
    return told(s.format(k=key, v=value), f"What is the {key}?", f"The {key} is {value}.")


def told(system: str, question: str, answer: str) -> Doc:
    return Doc("system", [{"role": "system", "content": system}, user(question), assistant(answer)], exact=True)


SYSTEM: list[tuple[Callable[[random.Random], Doc], float]] = [
    (system_number, 1.2),
    (system_capitals_facts, 0.5),
    (system_capitals_dates, 0.3),
    (system_capitals_words, 0.4),
    (system_capitals_sums, 0.3),
    (system_pirate, 1.2),
    (system_name, 1.2),
    (system_json, 1.2),
    (system_plain, 1.5),
    (system_fact, 1.0),
]


def some_fact(r: random.Random) -> tuple[str, str]:
    key = r.choice(["code", "number", "password", "word", "place", "friend", "key", word(r)])
    value = {"place": city, "friend": name, "number": quantity, "code": quantity}.get(key, word)(r)
    return key, str(value)


def introduced(r: random.Random) -> tuple[tuple[str, str], tuple[str, str]]:
    who = name(r)
    hello = r.choice(["My name is {}.", "Hi, I am {}.", "Hello! I'm {}.", "I am called {}."]).format(who)
    return (hello, f"Nice to meet you, {who}!"), (r.choice(FORMS["what is my"]), f"Your name is {who}.")


def remembered(r: random.Random) -> tuple[tuple[str, str], tuple[str, str]]:
    key, value = some_fact(r)
    said = r.choice(["My {k} is {v}.", "Remember: my {k} is {v}.", "Remember that my {k} is {v}."]).format(
        k=key, v=value
    )
    return (said, f"I will remember that your {key} is {value}."), (f"What is my {key}?", f"Your {key} is {value}.")


def more_to_add(r: random.Random) -> list[tuple[str, str]]:
    a, b, c = r.randint(1, 50), r.randint(1, 20), r.randint(1, 20)
    q = r.choice(["And plus {c}?", "Add {c} to that.", "Now add {c}.", "plus {c}?"]).format(c=c)
    return [(r.choice(ADD).format(a=a, b=b), f"{a} + {b} = {a + b}."), (q, f"{a + b} + {c} = {a + b + c}.")]


def day_after_day(r: random.Random) -> list[tuple[str, str]]:
    i = r.randrange(7)
    day, then, last = (DAYS[(i + n) % 7] for n in range(3))
    q = r.choice(["And after that?", "And the next one?", "What comes next?"])
    return [(f"What day comes after {day}?", f"After {day} comes {then}."), (q, f"After {then} comes {last}.")]


# Whoever has said a name is known by it.
IN_PASSING = [one for one in SMALL_TALK if not one[1][0].startswith("I do not know your name.")]


def exchange(r: random.Random) -> list[tuple[str, str]]:
    """One exchange, or two of which the second refers to the first."""
    kind = r.random()
    if kind < 0.15:
        return more_to_add(r)
    if kind < 0.25:
        return day_after_day(r)
    if kind < 0.3:
        asked, answers = r.choice(IN_PASSING)
        return [(r.choice(asked), answers[0])]
    return [(casual(r, q), a) if r.random() < 0.5 else (q, a) for q, a in [r.choice([pair, added])(r)]]


def turns(r: random.Random) -> Doc:
    """Two to six exchanges; what is told in the first is asked for in the last."""
    first, last = r.choice([(None, None), introduced(r), introduced(r), remembered(r)])
    spoken = [first] if first else []
    for _ in range(r.choice([1, 1, 2, 3])):
        spoken += exchange(r)
    if last:
        spoken.append(last)
    messages = [{"role": "system", "content": "You are a helpful assistant."}] if r.random() < 0.15 else []
    for q, a in spoken:
        messages += [user(q), assistant(a)]
    return Doc("turns", messages, exact=True)


def recalled(r: random.Random) -> Doc:
    """What was told is asked for at once."""
    (hello, nice), (q, a) = r.choice([introduced, remembered])(r)
    return Doc("turns", [user(hello), assistant(nice), user(q), assistant(a)], exact=True)
