"""How the bundled model's training cuts its documents into tokens: the text stays, and an answer's words are cut where
they are easiest to say."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from tiny_recipe import TINY, tiny_recipe

Module = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def recipe() -> Iterator[Module]:
    with tiny_recipe() as module:
        yield module


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(TINY / "tokenizer.json"))


def answer_of(recipe: Module, tokenizer: Any, question: str, answer: str, **options: Any) -> str:
    """The answer's tokens, a bar between each two."""
    dialogue = recipe("dialogue")
    doc = dialogue.Doc("talk", [dialogue.user(question), dialogue.assistant(answer)], **options)
    (made,) = recipe("encoding").encode(tokenizer, [doc])
    tokens = [tokenizer.decode([i], skip_special_tokens=False) for i in made.ids]
    assert [doc.render()[a:b] for a, b in made.offsets] == tokens
    return "|".join(tokens[tokens.index(dialogue.ASSISTANT) + 1 : -1])


def test_the_text_of_every_document_stays(recipe: Module, tokenizer: Any):
    data, dialogue, r = recipe("data"), recipe("dialogue"), random.Random(2)
    docs = [make(r) for make, _ in data.KINDS.values() for _ in range(8)]
    recut = 0
    for doc, made in zip(docs, recipe("encoding").encode(tokenizer, docs), strict=True):
        text = doc.render()
        assert tokenizer.decode(made.ids, skip_special_tokens=False) == text and not set(text) & {"\x02", "\x03"}
        assert len(made.ids) == len(made.offsets) and made.offsets == sorted(made.offsets)
        recut += made.ids != tokenizer.encode(text, add_special_tokens=False).ids
        begin = text.find(dialogue.ASSISTANT)
        before = [token for token, (start, _) in zip(made.ids, made.offsets, strict=True) if start < begin]
        assert before == tokenizer.encode(text[:begin], add_special_tokens=False).ids or begin < 0, (
            "a prompt is as given"
        )
    assert recut > len(docs) // 10


def test_a_repeated_word_is_cut_as_in_the_prompt(recipe: Module, tokenizer: Any):
    plain, prompt = (tokenizer.encode(text).tokens for text in ("ason", "Repeat: ason"))
    assert plain == ["ason"] and prompt[-2:] == ["Ġas", "on"]
    assert answer_of(recipe, tokenizer, "Repeat: ason", "ason") == "as|on"
    assert answer_of(recipe, tokenizer, "Find ason.", '{"word": "ason"}').endswith(' "|as|on|"}')
    assert answer_of(recipe, tokenizer, "Which word?", "ason") == "ason"
    assert answer_of(recipe, tokenizer, "Repeat: asons", "ason") == "ason"


def test_marked_letters_are_tokens_of_their_own(recipe: Module, tokenizer: Any):
    letterwise, upper = recipe("dialogue").letterwise, recipe("letters").upper
    assert answer_of(recipe, tokenizer, "What?", f"The word is {letterwise('never')}.").endswith(" is| n|e|v|e|r|.")
    assert answer_of(recipe, tokenizer, "Spell!", letterwise("t-e-n") + ".") == "t|-|e|-|n|."
    assert answer_of(recipe, tokenizer, "What?", upper("The end: 12.")) == "T|H|E| E|N|D|:| |1|2|."
    assert answer_of(recipe, tokenizer, "What?", upper(f"a {letterwise('to')}")) == "A| T|O"


def test_what_a_grammar_writes_has_its_own_cut(recipe: Module, tokenizer: Any):
    free = answer_of(recipe, tokenizer, "The ason is 7.", '{"ason": 7}')
    held = answer_of(recipe, tokenizer, "The ason is 7.", '{"ason": 7}', held=True)
    own = "|".join(tokenizer.decode([i]) for i in tokenizer.encode('{"ason": 7}', add_special_tokens=False).ids)
    assert held == own != free
