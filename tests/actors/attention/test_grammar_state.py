"""Matchers of one request: anew from its output's tokens, whatever that takes and whatever others took of the same
grammar."""

from __future__ import annotations

import random

from grammars import BYTES_END, byte_tokenizer

from isotherm.actors.attention.grammar_state import GrammarState
from isotherm.actors.attention.masks import Ask, Masks, StepMasks
from isotherm.cluster.messages.requests import Constraint
from isotherm.cluster.text.grammar import regex
from isotherm.cluster.text.grammar_vocabulary import GrammarVocabulary

BYTES = byte_tokenizer()
# So many states that the tokens in one go are more than may be made between two masks.
WORDS = Constraint(regex("([a-z]+ ?){1,3000}"))
A, BANG = (BYTES.encode(char).ids[0] for char in "a!")


def byte_vocabulary() -> GrammarVocabulary:
    return GrammarVocabulary(BYTES.to_str, BYTES_END, 257)


def words(count: int) -> list[int]:
    rng = random.Random(1)
    text = " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(count))
    return list(BYTES.encode(text).ids)[:count]


def masks_of(masks: Masks, state: GrammarState, tokens: list[int], draft: tuple[int, ...] = ()) -> StepMasks:
    return masks.begin(lambda: [Ask(0, state, tokens, 0, (BYTES_END,), draft)])()


def test_a_long_output_is_taken_at_once_as_it_was_token_by_token():
    tokens = words(1200)
    got = masks_of(Masks(byte_vocabulary), GrammarState(WORDS), tokens)
    assert got.errors == {} and not got.forbidden[0, A] and got.forbidden[0, BANG]
    assert not byte_vocabulary().matcher(WORDS.grammar).consume_tokens(tokens), "the test is of use"


def test_a_state_is_renewed_as_it_was():
    tokens, vocabulary = words(1200), byte_vocabulary()
    state = GrammarState(WORDS)
    state.take(tokens, 0, vocabulary)
    state.renew(vocabulary)
    assert not state.error and state.matcher.try_consume_tokens([A]) == 1
