"""Questions that are answered in JSON, free and held to a schema. One function a kind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from dialogue import sent_json
from sums import difference_parts, sum_parts
from texts import CAPITALS, CATEGORIES, FORMS
from vocabulary import city, name, phrase, quantity, word

Pair = tuple[str, str]
FIELDS: dict[str, Callable[[random.Random], Any]] = {
    "name": name, "city": city, "country": lambda r: r.choice(list(CAPITALS)), "age": lambda r: r.randint(1, 99),
    "count": quantity, "price": quantity, "number": quantity, "id": quantity, "year": lambda r: r.randint(1900, 2099),
    "title": lambda r: phrase(r, 3), "colour": lambda r: r.choice(CATEGORIES["colours"].split()),
    "animal": lambda r: r.choice(CATEGORIES["animals"].split()),
    "fruit": lambda r: r.choice(CATEGORIES["fruits"].split()),
    "word": word, "item": word, "friend": name, "user": name, "size": quantity, "text": lambda r: phrase(r, 4),
    "open": lambda r: r.random() < 0.5, "done": lambda r: r.random() < 0.5, "tags": lambda r: phrase(r, 3).split(),
}  # fmt: skip


def written(value: Any) -> str:
    """A value as a sentence has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(value) if isinstance(value, list) else str(value)


def record(r: random.Random) -> dict[str, Any]:
    """Some fields with values; now and then one under a made-up key."""
    keys = r.sample(list(FIELDS), r.randint(1, 4))
    made = {key: FIELDS[key](r) for key in keys}
    if r.random() < 0.2:
        made[word(r)] = r.choice([word(r), quantity(r)])
    return made


def told(r: random.Random, made: dict[str, Any]) -> str:
    """The record in words."""
    parts = [r.choice(["the {k} {v}", "{k} {v}"]).format(k=k, v=written(v)) for k, v in made.items()]
    named = "; ".join(f"{k}: {written(v)}" for k, v in made.items())
    if any(isinstance(value, list) for value in made.values()):  # a comma would be of the list
        return r.choice(["; ".join(parts), named])
    return r.choice([", ".join(parts), " and ".join(parts), named])


def sentence_of(r: random.Random, made: dict[str, Any]) -> str:
    text = told(r, made)
    return text[0].upper() + text[1:] + "."


def json_sum(r: random.Random) -> Pair:
    q, _, result = sum_parts(r)
    return r.choice(FORMS["answer in json"]).format(q=q), json.dumps({"answer": result})


def json_difference(r: random.Random) -> Pair:
    """A kind of its own, as held_difference is: no equation is said first, and of sums differences are learned last."""
    q, _, result = difference_parts(r)
    return r.choice(FORMS["answer in json"]).format(q=q), json.dumps({"answer": result})


def person(r: random.Random) -> tuple[str, dict[str, Any]]:
    """A sentence about somebody, and what it says."""
    made = {"name": name(r), "age": r.randint(2, 90), "city": city(r)}
    sentence = r.choice(["{name} is {age} years old and lives in {city}.", "{name}, {age}, lives in {city}.",
                         "{name} lives in {city} and is {age} years old.",
                         "I am {name}. I am {age} and live in {city}.",
                         "My friend {name} from {city} is {age}."])  # fmt: skip
    return sentence.format(**made), made


def json_person(r: random.Random) -> Pair:
    sentence, made = person(r)
    forms = ["{s} Extract name, age and city as JSON.", "Turn this into JSON: {s}", "{s} Write this as JSON.",
             "Give me a JSON object with the name {name}, the age {age} and the city {city}."]  # fmt: skip
    return r.choice(forms).format(s=sentence, **made), json.dumps(made)


def json_record(r: random.Random) -> Pair:
    made = record(r)
    forms = [
        "Write a JSON object with {t}.",
        "Give me a JSON object with {t}.",
        "As JSON: {t}",
        "Turn this into JSON: {t}",
    ]
    return r.choice(forms).format(t=told(r, made)), json.dumps(made, ensure_ascii=False)


def json_list(r: random.Random) -> Pair:
    category, members = r.choice(list(CATEGORIES.items()))
    n = r.randint(2, 4)
    q = r.choice(["Give me {n} {c} as a JSON list.", "List {n} {c} in JSON."]).format(n=n, c=category)
    return q, json.dumps({category: members.split()[:n]})


def json_items(r: random.Random) -> Pair:
    items: list[Any] = [quantity(r) if r.random() < 0.4 else word(r) for _ in range(r.randint(1, 6))]
    q = r.choice(["Make a JSON list of {s}.", "Write these as a JSON list: {s}", "As a JSON array: {s}"])
    return q.format(s=", ".join(map(str, items))), json.dumps(items)


def json_capital(r: random.Random) -> Pair:
    country, capital = r.choice(list(CAPITALS.items()))
    q = r.choice(["Answer in JSON: what is the capital of {c}?", "What is the capital of {c}? Answer in JSON."])
    return q.format(c=country), json.dumps({"country": country, "capital": capital})


def schema_of(made: dict[str, Any]) -> dict[str, Any]:
    def kind(value: Any) -> dict[str, Any]:
        if isinstance(value, list):
            return {"type": "array", "items": {"type": "string"}}
        return {"type": {bool: "boolean", int: "integer", str: "string"}[type(value)]}

    return {
        "type": "object",
        "properties": {key: kind(value) for key, value in made.items()},
        "required": list(made),
    }


def closed_schema_of(made: dict[str, Any]) -> dict[str, Any]:
    """Of these fields alone, as OpenAI's strict schemas are."""
    return schema_of(made) | {"additionalProperties": False}


def json_schema(r: random.Random) -> Pair:
    """The schema is in the prompt, as many clients put it there."""
    text, made = person(r) if r.random() < 0.4 else ("", record(r))
    if text and r.random() < 0.5:  # not all of what was said
        made = {key: made[key] for key in r.sample(list(made), r.randint(1, 2))}
    text = text or sentence_of(r, made)
    schema = sent_json(r, schema_of(made))
    q = r.choice(["{t} Answer in JSON by this schema: {s}", "{t}\nReply with JSON that fits the schema {s}",
                  "Schema: {s}\n{t}", "{t} Use this JSON schema: {s}"])  # fmt: skip
    return q.format(t=text, s=schema), json.dumps(made, ensure_ascii=False)


OPERANDS = [("a", "b"), ("first", "second"), ("x", "y"), ("left", "right"), ("one", "two")]
RESULTS = ["sum", "total", "result", "answer", "value", "number"]


def held_sum(r: random.Random) -> Pair:
    """The prompt does not tell of the schema that the answer is held to: only its values are learned."""
    return held_result(r, *sum_parts(r))


def held_difference(r: random.Random) -> Pair:
    return held_result(r, *difference_parts(r))


def held_result(r: random.Random, q: str, equation: str, result: int) -> Pair:
    a, b = (int(x) for x in equation.split() if x.isdigit())
    keys, of = r.choice(OPERANDS), r.choice(RESULTS)
    operands = dict(zip(keys, (a, b), strict=True))
    made: dict[str, Any] = r.choice([{of: result}, {of: result}, operands | {of: result}])
    return q, json.dumps(made)


def held_record(r: random.Random) -> Pair:
    if r.random() < 0.5:
        sentence, made = person(r)
        keys = [key for key in made if r.random() < 0.7] or ["name"]
        made = {key: made[key] for key in keys}
    else:
        made = record(r)
        sentence = sentence_of(r, made)
    return sentence, json.dumps(made, ensure_ascii=False)


JSON_FREE = [
    (json_sum, 2.0),
    (json_difference, 0.6),
    (json_person, 2.0),
    (json_record, 2.5),
    (json_list, 1.2),
    (json_items, 1.0),
    (json_capital, 0.7),
    (json_schema, 2.0),
]
JSON_HELD = [(held_sum, 1.0), (held_difference, 0.4), (held_record, 1.5)]
