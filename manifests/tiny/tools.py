"""Dialogues in which the tiny model is offered tools, calls one and reads what it gives back."""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

from dialogue import Doc, assistant, user
from tasks import calendar, facts, pair, words
from texts import ADD, CAPITALS, FORMS, NAMES, WORDS


class Given(NamedTuple):
    """What a case may speak of. All of it is drawn for every case, so that one kind of case does not shift the draws of
    the next."""

    city: str
    name: str
    word: str
    a: int
    b: int


class ToolCase(NamedTuple):
    """A tool, and one use of it from the question to the answer."""

    tool: dict[str, Any]
    question: str
    arguments: dict[str, Any]
    output: dict[str, Any]
    answer: str


def function(name: str, description: str, parameters: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """An OpenAI tool definition; `parameters` maps a name to its JSON type and description."""
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(parameters)},
        },
    }


def weather(r: random.Random, given: Given) -> ToolCase:
    where = r.choice(["city", "location", "city", "place"])
    tool = function(
        r.choice(["get_weather", "get_weather", "weather", "get_current_weather"]),
        r.choice(FORMS["get the weather"]),
        {where: ("string", "The city")},
    )
    degrees, sky = r.randint(-9, 35), r.choice(["sunny", "cloudy", "rainy", "windy", "snowy", "foggy"])
    return ToolCase(
        tool,
        r.choice(FORMS["what is the weather"]).format(c=given.city),
        {where: given.city},
        {"temperature": degrees, "condition": sky},
        f"It is {degrees} degrees and {sky} in {given.city}.",
    )


def addition(r: random.Random, given: Given) -> ToolCase:
    tool = function(
        r.choice(["add", "add_numbers", "sum"]),
        "Add two numbers.",
        {"a": ("number", "First number"), "b": ("number", "Second number")},
    )
    a, b = given.a, given.b
    return ToolCase(tool, r.choice(ADD).format(a=a, b=b), {"a": a, "b": b}, {"result": a + b}, f"{a} + {b} = {a + b}.")


def clock(r: random.Random, given: Given) -> ToolCase:
    tool = function(
        r.choice(["get_time", "get_current_time", "clock"]), "Get the time in a city.", {"city": ("string", "The city")}
    )
    time = f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}"
    question = r.choice(FORMS["what time is"]).format(c=given.city)
    return ToolCase(tool, question, {"city": given.city}, {"time": time}, f"It is {time} in {given.city}.")


def search(r: random.Random, given: Given) -> ToolCase:
    tool = function(
        r.choice(["search", "web_search", "lookup"]), "Search for a text.", {"query": ("string", "What to look for")}
    )
    n = r.randint(1, 40)
    question = r.choice(["Search for {w}.", "Look up {w}.", "Find {w}."]).format(w=given.word)
    return ToolCase(tool, question, {"query": given.word}, {"results": n}, f"I found {n} results for {given.word}.")


def message(r: random.Random, given: Given) -> ToolCase:
    tool = function(
        r.choice(["send_message", "send_mail", "notify"]),
        "Send a message to a person.",
        {"to": ("string", "The person"), "text": ("string", "The message")},
    )
    name, text = given.name, " ".join(r.choice(WORDS) for _ in range(r.randint(1, 3)))
    forms = ["Send {n} the message: {t}", "Tell {n}: {t}", 'Send "{t}" to {n}.']
    question = r.choice(forms).format(n=name, t=text)
    return ToolCase(tool, question, {"to": name, "text": text}, {"ok": True}, f"I sent the message to {name}.")


def alarm(r: random.Random, given: Given) -> ToolCase:
    tool = function(
        r.choice(["set_alarm", "set_timer"]),
        "Set an alarm after some minutes.",
        {"minutes": ("integer", "Minutes from now")},
    )
    n = r.randint(1, 90)
    question = r.choice(FORMS["set an alarm"]).format(n=n)
    return ToolCase(tool, question, {"minutes": n}, {"ok": True}, f"The alarm is set for {n} minutes from now.")


def household(r: random.Random, given: Given) -> ToolCase:
    verb, noun = r.choice(["open", "close", "start", "stop", "lock", "clean"]), r.choice(FORMS["door"])
    tool = function(
        f"{verb}_{r.choice(['item', 'thing', 'device'])}",
        f"{verb.capitalize()} something in the house.",
        {"name": ("string", "What to " + verb)},
    )
    done = {"stop": "stopped"}.get(verb, verb.rstrip("e") + "ed")
    return ToolCase(
        tool, f"{verb.capitalize()} the {noun}.", {"name": noun}, {"ok": True}, f"Done. The {noun} is {done}."
    )


CASES = [weather, weather, addition, clock, search, message, alarm, household]


def tool_case(r: random.Random) -> ToolCase:
    city, name, word = r.choice(list(CAPITALS.values())), r.choice(NAMES), r.choice(WORDS)
    given = Given(city, name, word, r.randint(1, 999), r.randint(1, 999))
    return CASES[r.randrange(len(CASES))](r, given)


def tools(r: random.Random) -> Doc:
    """One to three tools in the system part; most often one is called and its output read."""
    tool, q, arguments, output, answer = tool_case(r)
    offered = {tool["function"]["name"]: tool}
    for _ in range(r.choice([0, 0, 1, 2])):
        other = tool_case(r).tool
        if (
            other["function"]["description"] != tool["function"]["description"]
            and other["function"]["parameters"] != tool["function"]["parameters"]
        ):
            offered.setdefault(other["function"]["name"], other)
    listed = list(offered.values())
    r.shuffle(listed)
    messages: list[dict[str, Any]] = (
        [{"role": "system", "content": "You are a helpful assistant."}] if r.random() < 0.4 else []
    )
    if r.random() < 0.2:
        q, a = r.choice([calendar, facts, words])(r)
        return Doc("tools-unused", [*messages, user(q), assistant(a)], listed, exact=True)
    called = {"name": tool["function"]["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    call = {"id": "call_0", "type": "function", "function": called}
    text = json.dumps(output) if r.random() < 0.8 else ", ".join(f"{k}: {v}" for k, v in output.items())
    messages += [
        user(q),
        assistant(None, [call]),
        {"role": "tool", "tool_call_id": "call_0", "content": text},
        assistant(answer),
    ]
    if r.random() < 0.3:
        q, a = pair(r)[1]
        messages += [user(r.choice(["Thanks!", "Thank you."])), assistant("You are welcome!")]
    return Doc("tools", messages, listed, exact=True)
