"""Training dialogues of the tiny model, its chat template and its tokenizer recipe.

Every dialogue is made here by templates from a seeded `random.Random`; nothing is downloaded. The templates and facts
in texts.json are part of Isotherm (Apache-2.0); its prose is in the public domain (printed before 1929). Knows nothing
about the model or the optimiser.

A document is a `Doc`: either chat messages, rendered with CHAT_TEMPLATE exactly as a server renders them, or raw text.
"""

from __future__ import annotations

import json
import pathlib
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tasks import (
    ABOUT,
    ADD,
    CAPITALS,
    CODE,
    DAYS,
    FORMS,
    JOKES,
    NAMES,
    PROSE,
    SMALL_TALK,
    UNKNOWN,
    UNKNOWN_ANSWER,
    WORDS,
    arithmetic,
    calendar,
    casual,
    facts,
    long_sum,
    numbers,
    pair,
    sum_parts,
    units,
    word_problem,
    words,
)

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
TOOL_SPECIALS = [
    "tool▁calls▁begin",
    "tool▁call▁begin",
    "tool▁sep",
    "tool▁call▁end",
    "tool▁calls▁end",
    "tool▁outputs▁begin",
    "tool▁output▁begin",
    "tool▁output▁end",
    "tool▁outputs▁end",
]
PAD = "<｜▁pad▁｜>"
SPECIALS = [BOS, EOS, PAD, USER, ASSISTANT, *(f"<｜{name}｜>" for name in TOOL_SPECIALS), THINK, END_THINK]

# DeepSeek-V3.1's layout, less its `</think>` after <｜Assistant｜> when thinking is off: this model may open <think> by
# itself when asked.
CHAT_TEMPLATE = (pathlib.Path(__file__).parent / "chat_template.jinja").read_text()
_jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
_jinja.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
_template = _jinja.from_string(CHAT_TEMPLATE)


@dataclass
class Doc:
    """One training document. `task` names its generator; `exact` marks answers with one right wording, which the
    evaluation may compare."""

    task: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    exact: bool = False

    def render(self) -> str:
        """The document's text with its special tokens, `BOS` first and `EOS` last."""
        if self.text is not None:
            return BOS + self.text + EOS
        return _template.render(
            messages=self.messages, tools=self.tools, bos_token=BOS, eos_token=EOS, keep_thinking=True
        )


def prompt(messages: list[dict[str, Any]], **options: Any) -> str:
    """The text a server sends for `messages`; options are the template's (`tools`, `thinking`)."""
    return _template.render(messages=messages, bos_token=BOS, eos_token=EOS, add_generation_prompt=True, **options)


def thinking(r: random.Random) -> Doc:
    """Half of them ask for the thought in words; the others stand for a server's thinking switch, where the prompt
    itself opens <think>."""
    kind = r.randrange(4)
    if kind == 0:
        q, thought, answer = word_problem(r)
    elif kind == 1:
        q, thought, answer = long_sum(r)
    else:
        q, answer = r.choice([arithmetic, calendar, facts, units, numbers, words])(r)
        thought = "The question is: " + q + " " + r.choice(["I know this.", "Let me answer.", "That is simple."])
        if len(answer) < 30:
            thought += " " + answer
    asked = r.random() < 0.5
    if asked:
        q = r.choice(FORMS["think step by"]).format(q=q)
    return Doc(
        "thinking" if asked else "thinking-switch",
        [user(q), assistant(f"{THINK}{thought}{END_THINK}{answer}")],
        exact=asked,
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, tool_calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"tool_calls": tool_calls} if tool_calls else {})


def question(r: random.Random) -> Doc:
    task, (q, a) = pair(r)
    return Doc(task, [user(casual(r, q)), assistant(a)], exact=True)


def story_text(r: random.Random, sentences: int) -> str:
    """A story that goes on as long as asked, each sentence following from the place or the companion named before
    it."""
    name, friend = r.sample(NAMES, 2)
    animal = r.choice(FORMS["dog"])
    places = r.sample(["forest", "river", "old castle", "market", "mountain", "beach", "garden", "village", "lake",
                       "bridge", "cave", "farm"], 8)  # fmt: skip
    mood = r.choice(["happy", "curious", "brave", "kind", "clever", "quiet"])
    out = [
        r.choice(
            [
                f"Once upon a time there was a {mood} child called {name}.",
                f"Long ago, in a small village, there lived a {mood} child called {name}.",
                f"One morning {name}, a {mood} child, woke up very early.",
            ]
        ),
        r.choice(
            [f"{name} had a little {animal} who was never far away.", f"{name}'s best friend was a little {animal}."]
        ),
    ]
    for place in places * 4:
        thing = r.choice(FORMS["golden key"])
        out += [
            r.choice(
                [
                    f"One day {name} and the {animal} walked to the {place}.",
                    f"Then they went on to the {place}.",
                    f"After that they came to the {place}.",
                ]
            ),
            r.choice(
                [
                    f"There they found a {thing}.",
                    f"At the {place} lay a {thing}.",
                    f"Near the {place} they saw a {thing}.",
                ]
            ),
            r.choice(
                [
                    f'"What a beautiful {thing}!" said {name}.',
                    f'"Let us keep the {thing}," said {name}.',
                    f"{name} picked up the {thing} with care.",
                ]
            ),
            r.choice(
                [
                    f"The {animal} was very happy.",
                    f"The {animal} jumped for joy.",
                    f"The {animal} looked at it for a long time.",
                    f"They met {friend}, who was on the way home.",
                    f"{friend} was there too, and they sat down to talk.",
                ]
            ),
        ]
        if len(out) >= sentences - 2:
            break
    end = [
        r.choice(FORMS["in the evening"]),
        r.choice([f"{name} slept well that night. The end.", f"And {name} never forgot that day. The end."]),
    ]
    return " ".join(out[: max(sentences - 2, 4)] + end)


def story(r: random.Random) -> Doc:
    length = r.choice(["short", "", "", "long"])
    text = story_text(r, {"short": 7, "": 14, "long": 34}[length])
    q = r.choice(FORMS["tell me a"]).format(l=length).replace("  ", " ")
    return Doc("story", [user(q), assistant(text)])


def talk(r: random.Random) -> Doc:
    """Small talk, paragraphs about a topic, jokes, code, and an honest answer to what the model cannot know."""
    kind = r.choices(["small", "about", "joke", "code", "unknown", "poem"], [5, 4, 1, 1.5, 2, 1])[0]
    if kind == "small":
        asked, answers = r.choice(SMALL_TALK)
        return Doc(
            "talk",
            [user(casual(r, r.choice(asked)) if r.random() < 0.4 else r.choice(asked)), assistant(r.choice(answers))],
        )
    if kind == "about":
        topic, text = r.choice(list(ABOUT.items()))
        q = r.choice(FORMS["tell me about"])
        return Doc("about", [user(casual(r, q.format(t=topic))), assistant(text)], exact=True)
    if kind == "joke":
        return Doc("talk", [user(r.choice(FORMS["tell me a joke"])), assistant(r.choice(JOKES))])
    if kind == "code":
        task, text = r.choice(list(CODE.items()))
        q = r.choice(FORMS["write a python"])
        return Doc("code", [user(q.format(t=task)), assistant(text)], exact=True)
    if kind == "poem":
        thing = r.choice(FORMS["moon"])
        poem = (
            f"The {thing} is here, the {thing} is near,\nI see it every day.\n"
            "It makes no sound, it goes around,\nAnd then it slips away.\n\n"
            f"O {thing} so bright, O {thing} so light,\nCome back to us again.\n"
            "We wait for you the whole night through,\nIn sunshine and in rain."
        )
        return Doc("poem", [user(r.choice(FORMS["write a poem"]).format(t=thing)), assistant(poem)], exact=True)
    q = r.choice(UNKNOWN).format(name=r.choice(NAMES), word=r.choice(WORDS), n=r.randint(2, 99))
    return Doc("unknown", [user(casual(r, q)), assistant(UNKNOWN_ANSWER)], exact=True)


def system_prompt(r: random.Random) -> Doc:
    """Dialogues in which the system prompt changes the answer."""
    kind = r.randrange(6)
    if kind == 0:
        q, _, result = sum_parts(r)
        s, a = r.choice(FORMS["answer with the"]), str(result)
    elif kind == 1:
        _, (q, a) = pair(r)
        s, a = r.choice(["Write everything in capital letters.", "Answer in capital letters."]), a.upper()
        if len(a) > 80:
            return system_prompt(r)
    elif kind == 2:
        q, a = r.choice([arithmetic, calendar, facts])(r)
        s, a = r.choice(["You are a pirate.", "Speak like a pirate."]), f"Arr! {a}"
    elif kind == 3:
        name = r.choice(NAMES)
        s = r.choice(
            [f"Your name is {name}.", f"You are {name}, a friendly assistant.", f"You are an assistant called {name}."]
        )
        q, a = r.choice(["What is your name?", "Who are you?", "What are you called?"]), f"My name is {name}."
    elif kind == 4:
        q, _, result = sum_parts(r)
        s, a = (
            r.choice(["Answer in JSON.", "Always answer in JSON.", "Reply with JSON."]),
            json.dumps({"answer": result}),
        )
    else:
        q, a = pair(r)[1]
        s = r.choice(FORMS["you are a"])
    return Doc("system", [{"role": "system", "content": s}, user(q), assistant(a)], exact=True)


def turns(r: random.Random) -> Doc:
    """Two to five exchanges; some refer back to an earlier one."""
    name, messages = r.choice(NAMES), []
    if r.random() < 0.15:
        messages.append({"role": "system", "content": "You are a helpful assistant."})
    remembers = r.random() < 0.4
    if remembers:
        hello = r.choice([f"My name is {name}.", f"Hi, I am {name}.", f"Hello! I'm {name}.", f"I am called {name}."])
        messages += [user(hello), assistant(f"Nice to meet you, {name}!")]
    for _ in range(r.randint(1, 4)):
        kind = r.random()
        if kind < 0.2:
            a, b, c = r.randint(1, 50), r.randint(1, 20), r.randint(1, 20)
            messages += [
                user(r.choice(ADD).format(a=a, b=b)),
                assistant(f"{a} + {b} = {a + b}."),
                user(r.choice(["And plus {c}?", "Add {c} to that.", "Now add {c}.", "plus {c}?"]).format(c=c)),
                assistant(f"{a + b} + {c} = {a + b + c}."),
            ]
        elif kind < 0.3:
            i = r.randrange(7)
            messages += [
                user(f"What day comes after {DAYS[i]}?"),
                assistant(f"After {DAYS[i]} comes {DAYS[(i + 1) % 7]}."),
                user(r.choice(["And after that?", "And the next one?", "What comes next?"])),
                assistant(f"After {DAYS[(i + 1) % 7]} comes {DAYS[(i + 2) % 7]}."),
            ]
        elif kind < 0.38:
            asked, answers = r.choice(SMALL_TALK)
            messages += [user(r.choice(asked)), assistant(r.choice(answers))]
        else:
            q, a = pair(r)[1]
            messages += [user(casual(r, q)), assistant(a)]
    if remembers:
        messages += [user(r.choice(FORMS["what is my"])), assistant(f"Your name is {name}.")]
    return Doc("turns", messages, exact=True)


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


def tool_case(r: random.Random) -> tuple[dict[str, Any], str, dict[str, Any], Any, str]:
    """Tool, question, arguments, output, final answer."""
    city, name, word, a, b = (
        r.choice(list(CAPITALS.values())),
        r.choice(NAMES),
        r.choice(WORDS),
        r.randint(1, 999),
        r.randint(1, 999),
    )
    kind = r.randrange(8)
    if kind < 2:
        where = r.choice(["city", "location", "city", "place"])
        tool = function(
            r.choice(["get_weather", "get_weather", "weather", "get_current_weather"]),
            r.choice(FORMS["get the weather"]),
            {where: ("string", "The city")},
        )
        degrees, sky = r.randint(-9, 35), r.choice(["sunny", "cloudy", "rainy", "windy", "snowy", "foggy"])
        q = r.choice(FORMS["what is the weather"])
        return (
            tool,
            q.format(c=city),
            {where: city},
            {"temperature": degrees, "condition": sky},
            f"It is {degrees} degrees and {sky} in {city}.",
        )
    if kind == 2:
        tool = function(
            r.choice(["add", "add_numbers", "sum"]),
            "Add two numbers.",
            {"a": ("number", "First number"), "b": ("number", "Second number")},
        )
        return tool, r.choice(ADD).format(a=a, b=b), {"a": a, "b": b}, {"result": a + b}, f"{a} + {b} = {a + b}."
    if kind == 3:
        tool = function(
            r.choice(["get_time", "get_current_time", "clock"]),
            "Get the time in a city.",
            {"city": ("string", "The city")},
        )
        time = f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}"
        return (
            tool,
            r.choice(FORMS["what time is"]).format(c=city),
            {"city": city},
            {"time": time},
            f"It is {time} in {city}.",
        )
    if kind == 4:
        tool = function(
            r.choice(["search", "web_search", "lookup"]),
            "Search for a text.",
            {"query": ("string", "What to look for")},
        )
        n = r.randint(1, 40)
        q = r.choice(["Search for {w}.", "Look up {w}.", "Find {w}."]).format(w=word)
        return tool, q, {"query": word}, {"results": n}, f"I found {n} results for {word}."
    if kind == 5:
        tool = function(
            r.choice(["send_message", "send_mail", "notify"]),
            "Send a message to a person.",
            {"to": ("string", "The person"), "text": ("string", "The message")},
        )
        text = " ".join(r.choice(WORDS) for _ in range(r.randint(1, 3)))
        q = r.choice(["Send {n} the message: {t}", "Tell {n}: {t}", 'Send "{t}" to {n}.']).format(n=name, t=text)
        return tool, q, {"to": name, "text": text}, {"ok": True}, f"I sent the message to {name}."
    if kind == 6:
        tool = function(
            r.choice(["set_alarm", "set_timer"]),
            "Set an alarm after some minutes.",
            {"minutes": ("integer", "Minutes from now")},
        )
        n = r.randint(1, 90)
        return (
            tool,
            r.choice(FORMS["set an alarm"]).format(n=n),
            {"minutes": n},
            {"ok": True},
            f"The alarm is set for {n} minutes from now.",
        )
    verb, noun = r.choice(["open", "close", "start", "stop", "lock", "clean"]), r.choice(FORMS["door"])
    tool = function(
        f"{verb}_{r.choice(['item', 'thing', 'device'])}",
        f"{verb.capitalize()} something in the house.",
        {"name": ("string", "What to " + verb)},
    )
    done = {"stop": "stopped"}.get(verb, verb.rstrip("e") + "ed")
    return tool, f"{verb.capitalize()} the {noun}.", {"name": noun}, {"ok": True}, f"Done. The {noun} is {done}."


def tools(r: random.Random) -> Doc:
    """One to three tools in the system part; most often one is called and its output read."""
    tool, q, arguments, output, answer = tool_case(r)
    offered = {tool["function"]["name"]: tool}
    for _ in range(r.choice([0, 0, 1, 2])):
        other = tool_case(r)[0]
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


def raw(r: random.Random) -> Doc:
    """Text without a chat frame: prose, stories, lists and facts, for the completions endpoint."""
    kind = r.randrange(6)
    if kind < 2:
        return Doc("prose", text=r.choice(PROSE))
    if kind == 2:
        return Doc("raw", text=story_text(r, r.choice([10, 20, 40])))
    if kind == 3:
        return Doc("raw", text=", ".join(str(i) for i in range(1, r.randint(20, 200))))
    if kind == 4:
        return Doc("raw", text=" ".join(facts(r)[1] for _ in range(r.randint(1, 6))))
    return Doc(
        "raw",
        text="\n".join(
            f"Q: {q}\nA: {a}" for q, a in (r.choice([arithmetic, calendar, facts])(r) for _ in range(r.randint(2, 6)))
        ),
    )


def long_list(r: random.Random) -> Doc:
    """Answers of some hundred tokens, so that long generations stay sensible."""
    if r.random() < 0.6:
        n = r.choice([50, 60, 80, 100, 100, 100, 120, 150, 200])
        q = r.choice(FORMS["long_list: count to"]).format(n=n)
        return Doc("long", [user(q), assistant(", ".join(map(str, range(1, n + 1))) + ".")], exact=True)
    top = r.choice([5, 6, 10])
    q = r.choice(FORMS["write the times tables"]).format(t=top)
    return Doc(
        "long",
        [user(q), assistant("\n".join(f"{a} × {b} = {a * b}" for a in range(2, top + 1) for b in range(1, 11)))],
        exact=True,
    )


MIX: list[tuple[Callable[[random.Random], Doc], float]] = [
    (question, 62),
    (turns, 10),
    (thinking, 9),
    (system_prompt, 8),
    (tools, 6),
    (talk, 11),
    (story, 1.5),
    (raw, 3.5),
    (long_list, 0.7),
]


def document(r: random.Random) -> Doc:
    return r.choices([make for make, _ in MIX], [weight for _, weight in MIX])[0](r)


def held_out(doc: Doc) -> bool:
    """Whether a document is kept from training: a twentieth of all, by a hash of its text, so that both sides agree
    without a list."""
    return zlib.crc32(doc.render().encode()) % 20 == 0


def train_tokenizer(vocab_size: int, seed: int):
    """Byte-level BPE over made documents, with single-digit numbers and DeepSeek's special tokens first. Returns a
    `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    r = random.Random(seed)
    sample = [document(r).render() for _ in range(12000)] + PROSE * 3
    for special in SPECIALS:
        sample = [text.replace(special, "\n") for text in sample]
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer
