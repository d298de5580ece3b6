"""The tables of texts.json by name: words, facts, prose and the ways to ask.

They are part of Isotherm (Apache-2.0); the prose is in the public domain (printed before 1929).
"""

from __future__ import annotations

import json
import pathlib

_texts = json.loads((pathlib.Path(__file__).parent / "texts.json").read_text())
DAYS: list[str] = _texts["days"]
MONTHS: list[str] = _texts["months"]
SEASONS: list[str] = _texts["seasons"]
NUMBER_WORDS: list[str] = _texts["number_words"]
ORDINALS: list[str] = _texts["ordinals"]
NAMES: list[str] = _texts["names"]
WORDS: list[str] = _texts["words"]
THINGS: list[str] = _texts["things"]
MONTH_DAYS: list[int | str] = _texts["month_days"]
CAPITALS: dict[str, str] = _texts["capitals"]
COLOURS: dict[str, str] = _texts["colours"]
SOUNDS: dict[str, str] = _texts["sounds"]
YOUNG: dict[str, str] = _texts["young"]
OPPOSITES: dict[str, str] = _texts["opposites"]
PLURALS: dict[str, str] = _texts["plurals"]
PAST: dict[str, str] = _texts["past"]
GREETINGS: dict[str, str] = _texts["greetings"]
THANKS: dict[str, str] = _texts["thanks"]
IRREGULAR: dict[str, str] = _texts["irregular"]
CATEGORIES: dict[str, str] = _texts["categories"]
ABOUT: dict[str, str] = _texts["about"]
CODE: dict[str, str] = _texts["code"]
LEGS: dict[str, int] = _texts["legs"]
UNITS: list[tuple[str, str, int]] = _texts["units"]
ADD: list[str] = _texts["add"]
SUB: list[str] = _texts["sub"]
MUL: list[str] = _texts["mul"]
DIV: list[str] = _texts["div"]
POLITE: list[str] = _texts["polite"]
PROSE: list[str] = _texts["prose"]
JOKES: list[str] = _texts["jokes"]
UNKNOWN: list[str] = _texts["unknown"]
FORMS: dict[str, list[str]] = _texts["forms"]  # ways to ask the same thing, by the first words of the first way
SMALL_TALK: list[list[list[str]]] = _texts["small_talk"]
UNKNOWN_ANSWER = (
    "I am a very small model, and I do not know that. "
    "I can do small sums, days and months, spelling, counting and simple facts."
)
