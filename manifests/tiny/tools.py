"""Dialogues in which the tiny model is offered tools, calls one and reads what it gives back."""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

from dialogue import Doc, assistant, sent_json, user
from tasks import pair
from texts import ADD, FORMS, MUL, SUB
from vocabulary import city, name, phrase, quantity, word


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
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def varied(r: random.Random, tool: dict[str, Any]) -> dict[str, Any]:
    """The same tool as other clients write it: without descriptions, with what need not be given, or closed."""
    schema = tool["function"]["parameters"]
    if r.random() < 0.3:
        for member in schema["properties"].values():
            member.pop("description", None)
    if r.random() < 0.15:
        schema["properties"].setdefault(r.choice(["days", "limit", "page", "unit"]), {"type": "integer", "default": 1})
    if r.random() < 0.2:
        schema["additionalProperties"] = False
    return tool


def weather(r: random.Random, given: Given) -> ToolCase:
    where = r.choice(["city", "location", "city", "place"])
    tool = function(
        r.choice(["get_weather", "get_weather", "weather", "get_current_weather"]),
        r.choice(FORMS["get the weather"]),
        {where: ("string", "The city")},
    )
    question, arguments = r.choice(FORMS["what is the weather"]).format(c=given.city), {where: given.city}
    if r.random() < 0.3:
        units = ["celsius", "fahrenheit"]
        tool["function"]["parameters"]["properties"]["unit"] = {"type": "string", "enum": units}
        if r.random() < 0.5:
            arguments["unit"] = r.choice(units)
            question = f"{question[:-1]} in {r.choice([str, str.capitalize])(arguments['unit'])}{question[-1]}"
    degrees, sky = r.randint(-9, 35), r.choice(["sunny", "cloudy", "rainy", "windy", "snowy", "foggy"])
    output = {"temperature": degrees, "condition": sky}
    return ToolCase(tool, question, arguments, output, f"It is {degrees} degrees and {sky} in {given.city}.")


OPERANDS = [("a", "b"), ("a", "b"), ("x", "y"), ("first", "second"), ("num1", "num2"), ("left", "right")]


def of_two_numbers(r: random.Random, names: list[str], description: str) -> dict[str, Any]:
    keys = zip(r.choice(OPERANDS), ("First number", "Second number"), strict=True)
    return function(r.choice(names), description, {key: ("number", text) for key, text in keys})


def operands(tool: dict[str, Any], a: int, b: int) -> dict[str, Any]:
    """Its arguments."""
    return dict(zip(tool["function"]["parameters"]["required"], (a, b), strict=True))


def addition(r: random.Random, given: Given) -> ToolCase:
    tool = of_two_numbers(
        r, ["add", "add_numbers", "sum"], r.choice(["Add two numbers.", "Adds two numbers together."])
    )
    a, b = given.a, given.b
    forms = r.choice([ADD, ADD, ADD, ["Use {tool} to {add}", "Use the {tool} tool to {add}", "Call {tool} to {add}"]])
    add = r.choice(["compute {a} + {b}.", "calculate {a} + {b}.", "add {a} and {b}.", "find {a} plus {b}."])
    q = r.choice(forms).format(a=a, b=b, tool=tool["function"]["name"], add=add.format(a=a, b=b))
    return ToolCase(tool, q, operands(tool, a, b), {"result": a + b}, f"{a} + {b} = {a + b}.")


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
    who, text = given.name, phrase(r, 4)
    forms = ["Send {n} the message: {t}", "Tell {n}: {t}", 'Send "{t}" to {n}.']
    question = r.choice(forms).format(n=who, t=text)
    return ToolCase(tool, question, {"to": who, "text": text}, {"ok": True}, f"I sent the message to {who}.")


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


def product(r: random.Random, given: Given) -> ToolCase:
    tool = of_two_numbers(r, ["multiply", "product", "times"], "Multiply two numbers.")
    a, b = given.a, given.b
    forms = r.choice([MUL, MUL, MUL, ["Use {tool} to {times}", "Use the {tool} tool to {times}"]])
    times = r.choice(["compute {a} * {b}.", "calculate {a} × {b}.", "multiply {a} by {b}."]).format(a=a, b=b)
    q = r.choice(forms).format(a=a, b=b, tool=tool["function"]["name"], times=times)
    return ToolCase(tool, q, operands(tool, a, b), {"result": a * b}, f"{a} × {b} = {a * b}.")


def calculator(r: random.Random, given: Given) -> ToolCase:
    tool = function(
        r.choice(["calculator", "calculate", "evaluate"]),
        r.choice(["Evaluate an arithmetic expression.", "Calculate the value of an expression."]),
        {"expression": ("string", r.choice(["The expression", "The expression, such as 2 + 3"]))},
    )
    b, a = sorted((given.a, given.b))
    sign, forms, result = r.choice([("+", ADD, a + b), ("-", SUB, a - b), ("*", MUL, a * b)])
    answer = f"{a} {sign.replace('*', '×')} {b} = {result}."
    question = r.choice(forms).format(a=a, b=b)
    return ToolCase(tool, question, {"expression": f"{a} {sign} {b}"}, {"result": result}, answer)


def translation(r: random.Random, given: Given) -> ToolCase:
    tool = function(
        r.choice(["translate", "translate_text"]),
        "Translate a text.",
        {"text": ("string", "The text"), "language": ("string", "Into this language")},
    )
    text, language = phrase(r, 3), r.choice(["French", "German", "Spanish", "Italian", "Japanese", "Latin", "Dutch"])
    said = phrase(r, 3)
    q = r.choice(['Translate "{t}" to {l}.', "How do you say {t} in {l}?", "Translate {t} into {l}."])
    return ToolCase(
        tool,
        q.format(t=text, l=language),
        {"text": text, "language": language},
        {"text": said},
        f'In {language} it is "{said}".',
    )


def bank(r: random.Random, given: Given) -> ToolCase:
    tool = function(
        r.choice(["pay", "send_money", "transfer"]),
        r.choice(["Send money to a person.", "Pay somebody."]),
        {"to": ("string", "The person"), "amount": ("integer", "How much")},
    )
    q = r.choice(["Pay {a} euros to {n}.", "Send {n} {a} euros.", "Transfer {a} to {n}."])
    arguments = {"to": given.name, "amount": given.a}
    return ToolCase(
        tool, q.format(n=given.name, a=given.a), arguments, {"ok": True}, f"I sent {given.a} to {given.name}."
    )


def anything(r: random.Random, given: Given) -> ToolCase:
    """A tool of made-up name with made-up parameters: all of them have to be read."""
    verb, noun = r.choice(["get", "set", "make", "find", "update", word(r)]), word(r)
    keys = [word(r) for _ in range(r.randint(1, 3))]
    arguments: dict[str, Any] = {key: quantity(r) if r.random() < 0.4 else word(r) for key in keys}
    types = {key: ("integer" if isinstance(value, int) else "string", f"The {key}") for key, value in arguments.items()}
    tool = function(f"{verb}_{noun}", f"{verb.capitalize()} a {noun}.", types)
    listed = " and ".join(f"{key} {value}" for key, value in arguments.items())
    q = r.choice(["{v} {n} with {l}.", "Please {v} the {n}: {l}", "Use {v}_{n} with {l}."])
    done = quantity(r)
    return ToolCase(tool, q.format(v=verb, n=noun, l=listed), arguments, {"result": done}, f"The result is {done}.")


CASES = [
    weather,
    weather,
    addition,
    product,
    calculator,
    clock,
    search,
    message,
    alarm,
    household,
    translation,
    bank,
    anything,
    anything,
]


def tool_case(r: random.Random) -> ToolCase:
    most = r.choice([12, 99, 999, 999])  # what is small is known without a tool, and is asked of it all the same
    given = Given(city(r), name(r), word(r), r.randint(1, most), r.randint(1, most))
    return CASES[r.randrange(len(CASES))](r, given)


def computes(tool: dict[str, Any]) -> bool:
    """Whether a sum might be asked of it."""
    parameters = tool["function"]["parameters"]
    kinds = {parameters["properties"][key]["type"] for key in parameters["required"]}
    return kinds == {"number"} or parameters["required"] == ["expression"]


def offer(r: random.Random, tool: dict[str, Any]) -> list[dict[str, Any]]:
    """The tool, and up to two others that can be told from it."""
    offered = {tool["function"]["name"]: tool}
    for _ in range(r.choice([0, 0, 1, 2])):
        other = varied(r, tool_case(r).tool)
        apart = ("description", "parameters")
        alike = any(other["function"][part] == tool["function"][part] for part in apart)
        if not alike and not (computes(other) and computes(tool)):
            offered.setdefault(other["function"]["name"], other)
    listed = list(offered.values())
    r.shuffle(listed)
    return listed


def system(r: random.Random) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "You are a helpful assistant."}] if r.random() < 0.3 else []


def called(tool: dict[str, Any], arguments: dict[str, Any], i: int = 0) -> dict[str, Any]:
    function = {"name": tool["function"]["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{i}", "type": "function", "function": function}


# Ways to ask for a tool by its name, or for the only one.
NAMED = [
    "{q} Use the tool.",
    "{q} Call the tool.",
    "{q} Use {tool}.",
    "{q} Use the {tool} tool.",
    "Use {tool}: {q}",
    "Use the {tool} tool: {q}",
    "Call {tool}: {q}",
    "Use {tool} to answer: {q}",
]


def tools(r: random.Random) -> Doc:
    """One to three tools in the system part; one is called and its output read."""
    tool, q, arguments, output, answer = tool_case(r)
    varied(r, tool)
    if r.random() < 0.2:
        q = r.choice(NAMED).format(q=q, tool=tool["function"]["name"])
    text = sent_json(r, output) if r.random() < 0.8 else ", ".join(f"{k}: {v}" for k, v in output.items())
    if list(output) == ["result"] and r.random() < 0.3:
        text = str(output["result"])
    messages = [
        *system(r),
        user(q),
        assistant(None, [called(tool, arguments)]),
        {"role": "tool", "tool_call_id": "call_0", "content": text},
        assistant(answer),
    ]
    if r.random() < 0.15:
        messages += [user(r.choice(["Thanks!", "Thank you."])), assistant("You are welcome!")]
    return Doc("tools", messages, offer(r, tool), exact=True)


def tools_unused(r: random.Random) -> Doc:
    """Tools that the question has no use for."""
    q, a = pair(r)
    while q.startswith(("Add", "Sum", "Multiply")) or any(sign in a for sign in "+×"):
        q, a = pair(r)
    return Doc("tools-unused", [*system(r), user(q), assistant(a)], offer(r, tool_case(r).tool), exact=True)
