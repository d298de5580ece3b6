"""Stories that the tiny model learns to tell, of any length."""

from __future__ import annotations

import random

from dialogue import Doc, assistant, user
from texts import FORMS, NAMES


def story_text(r: random.Random, sentences: int) -> str:
    """A story that goes on as long as asked, each sentence following from the place or the companion named before
    it."""
    name, friend = r.sample(NAMES, 2)
    animal = r.choice(FORMS["dog"])
    places = r.sample(["forest", "river", "old castle", "market", "mountain", "beach", "garden", "village", "lake",
                       "bridge", "cave", "farm"], 8)  # fmt: skip
    mood = r.choice(["happy", "curious", "brave", "kind", "clever", "quiet"])
    out = opening(r, name, animal, mood)
    for place in places * 4:
        out += scene(r, place, name, friend, animal)
        if len(out) >= sentences - 2:
            break
    end = [
        r.choice(FORMS["in the evening"]),
        r.choice([f"{name} slept well that night. The end.", f"And {name} never forgot that day. The end."]),
    ]
    return " ".join(out[: max(sentences - 2, 4)] + end)


def opening(r: random.Random, name: str, animal: str, mood: str) -> list[str]:
    """Two sentences: the child, and its companion."""
    return [
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


def scene(r: random.Random, place: str, name: str, friend: str, animal: str) -> list[str]:
    """Four sentences: a way, a find, and what two of them make of it."""
    thing = r.choice(FORMS["golden key"])
    return [
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


def story(r: random.Random) -> Doc:
    length = r.choice(["short", "", "", "long"])
    text = story_text(r, {"short": 7, "": 14, "long": 34}[length])
    q = r.choice(FORMS["tell me a"]).format(l=length).replace("  ", " ")
    return Doc("story", [user(q), assistant(text)])
