"""Stories that the tiny model learns to tell, of any length.

What a sentence says follows from those before it, so that a model that takes the likeliest word each time does not walk
in circles: one place leads to the next, each has what is found there, and ways to say a thing come in turn."""

from __future__ import annotations

import random
from typing import NamedTuple

from dialogue import Doc, assistant, user
from texts import FORMS, NAMES
from vocabulary import article, word

# What is found at each place, which the next one follows; after the last comes the first.
PLACES = {
    "forest": "strange map", "river": "blue stone", "old castle": "golden key", "market": "warm loaf of bread",
    "mountain": "silver coin", "beach": "white shell", "garden": "red apple", "village": "small lamp",
    "lake": "wooden boat", "bridge": "letter", "cave": "old book", "farm": "basket of eggs",
}  # fmt: skip
MOODS = ["happy", "curious", "brave", "kind", "clever", "quiet"]
BEGIN = [
    "Once upon a time there was a {mood} child called {name}.",
    "Long ago, in a small village, there lived a {mood} child called {name}.",
    "One morning {name}, a {mood} child, woke up very early.",
]
COMPANION = ["{name} had a little {animal} who was never far away.", "{name}'s best friend was a little {animal}."]
WAY = [
    "One day {name} and the {animal} walked to the {place}.",
    "Then they went on to the {place}.",
    "After that they came to the {place}.",
]
FIND = ["There they found {a_thing}.", "At the {place} lay {a_thing}.", "Near the {place} they saw {a_thing}."]
PRAISE = [
    '"What a beautiful {thing}!" said {name}.',
    '"Let us keep the {thing}," said {name}.',
    "{name} picked up the {thing} with care.",
]
THEN = [
    "The {animal} was very happy.",
    "The {animal} jumped for joy.",
    "The {animal} looked at it for a long time.",
    "They met {friend}, who was on the way home.",
    "{friend} was there too, and they sat down to talk.",
]
END = ["{name} slept well that night. The end.", "And {name} never forgot that day. The end."]


class Cast(NamedTuple):
    """Whom and what a story is about: a child, its companion, and what is found first."""

    name: str
    animal: str
    things: list[str]


def cast(r: random.Random) -> Cast:
    return Cast(r.choice(NAMES), r.choice(FORMS["dog"]), [])


def story_text(r: random.Random, sentences: int, of: Cast | None = None) -> str:
    """A story that goes on as long as asked."""
    name, animal, things = of or cast(r)
    said = dict(name=name, animal=animal, friend=r.choice([n for n in NAMES if n != name]), mood=r.choice(MOODS))
    out = [r.choice(BEGIN).format(**said), r.choice(COMPANION).format(**said)]
    places, first = list(PLACES), r.randrange(len(PLACES))
    # A way to say it is the next one each time, after the first, which only the beginning of a story says.
    turns = [r.sample(ways, len(ways)) for ways in (WAY[1:], FIND, PRAISE, THEN)]
    for number in range(sentences):
        if len(out) >= sentences - 2:
            break
        place = places[(first + number) % len(places)]
        thing = things[number] if number < len(things) else PLACES[place]
        said |= dict(place=place, thing=thing, a_thing=article(thing))
        ways = [turn[number % len(turn)] for turn in turns]
        out += [way.format(**said) for way in ([WAY[0], *ways[1:]] if not number else ways)]
    end = [r.choice(FORMS["in the evening"]), r.choice(END).format(**said)]
    return " ".join(out[: max(sentences - 2, 4)] + end)


LENGTHS = {"short": 7, "": 14, "long": 34}


def story(r: random.Random) -> Doc:
    length = r.choice(["short", "", "", "long"])
    q = r.choice(FORMS["tell me a"]).format(l=length).replace("  ", " ")
    return Doc("story", [user(q), assistant(story_text(r, LENGTHS[length]))])


def story_about(r: random.Random) -> Doc:
    """An animal that is asked for is the companion, a name the child's, and anything else is found."""
    name, animal, _ = cast(r)
    things = [word(r) if r.random() < 0.6 else r.choice([*PLACES, *PLACES.values()]) for _ in range(2)]
    found, about = r.choice([
        ([], [article(animal)]), ([], [name]), ([], [name, article(animal)]), ([], [article(animal), name]),
        (things[:1], [article(things[0])]), (things, [article(things[0]), article(things[1])]),
        (things[:1], [article(animal), article(things[0])]), (things[:1], [article(things[0]), article(animal)]),
        (things[:1], [name, article(things[0])]),
    ])  # fmt: skip
    length = r.choice(["short", "", "", "long"])
    ask = r.choice(FORMS["tell me a"]).replace("story", f"story about {' and '.join(about)}")
    q = ask.format(l=length).replace("  ", " ")
    sentences = max(LENGTHS[length], 4 + 4 * len(found))  # so that each is found
    return Doc("story", [user(q), assistant(story_text(r, sentences, Cast(name, animal, found)))])
