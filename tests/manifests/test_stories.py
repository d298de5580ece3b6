"""What the bundled model is taught to tell: stories of what was asked for, that walk in no circles."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import ModuleType

import pytest
from tiny_recipe import tiny_recipe

Module = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def recipe() -> Iterator[Module]:
    with tiny_recipe() as module:
        yield module


def test_a_story_is_about_what_was_asked_for(recipe: Module):
    stories, r = recipe("stories"), random.Random(4)
    for _ in range(200):
        question, answer = (message["content"] for message in stories.story_about(r).messages)
        asked = re.search(r"story about (.+?)[.?]?$", question)[1].split(" and ")
        for one in asked:
            noun = one.removeprefix("an ").removeprefix("a ")
            assert re.search(rf"\b{re.escape(noun)}\b", answer), (question, answer)


def test_no_place_comes_again_before_all_have_been_seen(recipe: Module):
    stories, r = recipe("stories"), random.Random(4)
    place = re.compile(f"(?:walked to|went on to|came to) the ({'|'.join(stories.PLACES)})")
    for _ in range(50):
        seen = place.findall(stories.story_text(r, 60))
        assert len(seen) > len(stories.PLACES) and len(set(seen[: len(stories.PLACES)])) == len(stories.PLACES)
        order = list(stories.PLACES)
        assert all(order.index(b) == (order.index(a) + 1) % len(order) for a, b in pairwise(seen))


@pytest.mark.parametrize("sentences", [7, 14, 34])
def test_a_story_is_as_long_as_asked_and_ends(recipe: Module, sentences: int):
    stories, r = recipe("stories"), random.Random(4)
    for _ in range(50):
        text = stories.story_text(r, sentences)
        assert text.endswith("The end.") and len(re.findall(r"[.!]\"? (?=[\"A-Z])|[.!]$", text)) >= sentences - 1
