"""Training dialogues of the tiny model, their mix, and its tokenizer recipe.

Every dialogue is made here by templates from a seeded `random.Random`; nothing is downloaded. Knows nothing about the
model or the optimiser.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable

from dialogue import BOS, END_THINK, EOS, PAD, SPECIALS, THINK, Doc, assistant, user
from stories import story, story_text
from tasks import arithmetic, calendar, casual, facts, long_sum, numbers, pair, sum_parts, units, word_problem, words
from texts import ABOUT, ADD, CODE, DAYS, FORMS, JOKES, NAMES, PROSE, SMALL_TALK, UNKNOWN, UNKNOWN_ANSWER, WORDS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tools import tools


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


def question(r: random.Random) -> Doc:
    task, (q, a) = pair(r)
    return Doc(task, [user(casual(r, q)), assistant(a)], exact=True)


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


def train_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """Byte-level BPE over made documents, with single-digit numbers and DeepSeek's special tokens first. As in the
    published tokenizers, only those that bound a text are flagged special: tags of thoughts and tools are text, which
    parsers of a reply are to see. Returns a `tokenizers.Tokenizer`."""
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
    shown = [special for special in SPECIALS if special not in (BOS, EOS, PAD)]
    tokenizer.add_tokens([AddedToken(special, special=False, normalized=False) for special in shown])
    return tokenizer
