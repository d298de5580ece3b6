"""Matchers of one request: anew from its output's tokens, whatever that takes and whatever others took of the same
grammar."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable

import pytest
import torch
from grammars import BYTES_END, byte_tokenizer

from isotherm.actors.attention import masks as masks_module
from isotherm.actors.attention.grammar_state import GrammarState
from isotherm.actors.attention.masks import Ask, Masks, StepMasks
from isotherm.cluster.messages.requests import Constraint
from isotherm.cluster.text import grammar_vocabulary
from isotherm.cluster.text.grammar import regex
from isotherm.cluster.text.grammar_vocabulary import GrammarVocabulary
from isotherm.kernels.ops import token_bits

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
    allowed = token_bits(got.allowed, byte_vocabulary().width)
    assert got.errors == {} and allowed[0, A] and not allowed[0, BANG]
    assert not byte_vocabulary().compiled(WORDS.grammar).copy().consume_tokens(tokens), "the test is of use"


def test_a_state_is_renewed_as_it_was():
    tokens, vocabulary = words(1200), byte_vocabulary()
    state = GrammarState(WORDS)
    state.take(tokens, 0, vocabulary)
    state.renew(vocabulary)
    assert not state.error and state.matcher.try_consume_tokens([A]) == 1


@pytest.fixture
def vocabulary() -> GrammarVocabulary:
    return byte_vocabulary()


@pytest.fixture
def compiled(vocabulary: GrammarVocabulary, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each grammar that is compiled."""
    grammars, fresh_matcher = list[str](), vocabulary.fresh_matcher
    monkeypatch.setattr(vocabulary, "fresh_matcher", lambda text: [grammars.append(text), fresh_matcher(text)][1])
    return grammars


def exhaust(vocabulary: GrammarVocabulary) -> None:
    """Use up a lexer, as other requests with the same grammar may."""
    assert not vocabulary.compiled(WORDS.grammar).copy().consume_tokens(words(1200))


def test_what_fails_is_compiled_once_for_all(vocabulary: GrammarVocabulary, compiled: list[str]):
    masks, tokens = Masks(lambda: vocabulary), words(40)
    states = [GrammarState(WORDS) for _ in range(4)]
    for state in states[:2]:
        assert masks_of(masks, state, tokens[:30]).errors == {}
    exhaust(vocabulary)
    for state in states:
        assert masks_of(masks, state, tokens).errors == {}
    assert len(compiled) == 2


def test_a_request_that_cannot_share_goes_on_alone(vocabulary: GrammarVocabulary, compiled: list[str]):
    """Others use up each matcher that is shared."""
    masks, tokens, state = Masks(lambda: vocabulary), words(40), GrammarState(WORDS)
    assert masks_of(masks, state, tokens[:30]).errors == {}
    shared: Callable[..., grammar_vocabulary.Compiled] = vocabulary.compiled

    def exhausted(text: str, instead_of: grammar_vocabulary.Compiled | None = None) -> grammar_vocabulary.Compiled:
        found = shared(text, instead_of)
        found.copy().consume_tokens(words(1200))
        return found

    exhaust(vocabulary)
    vocabulary.compiled = exhausted  # type: ignore[method-assign]
    assert masks_of(masks, state, tokens).errors == {}
    assert len(compiled) == 3


def test_a_matcher_of_which_much_was_taken_is_let_go(
    vocabulary: GrammarVocabulary, compiled: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grammar_vocabulary, "MOST_TAKEN", 100)
    masks, tokens = Masks(lambda: vocabulary), words(60)
    first = GrammarState(WORDS)
    for i in range(0, 60, 10):
        assert masks_of(masks, first, tokens[:i]).errors == {}
    assert masks_of(masks, GrammarState(WORDS), tokens).errors == {}
    assert len(compiled) == 1 and not vocabulary.is_ready(WORDS.grammar)
    assert masks_of(masks, first, tokens).errors == {} and masks_of(masks, GrammarState(WORDS), tokens).errors == {}
    assert len(compiled) == 2 and vocabulary.is_ready(WORDS.grammar)


def test_what_was_prepared_is_kept_for_its_request(monkeypatch: pytest.MonkeyPatch):
    """However many others come before its first step."""
    monkeypatch.setattr(grammar_vocabulary, "MATCHERS", 2)
    vocabulary = byte_vocabulary()
    masks, compiled, fresh_matcher = Masks(lambda: vocabulary), list[str](), vocabulary.fresh_matcher
    monkeypatch.setattr(vocabulary, "fresh_matcher", lambda text: [compiled.append(text), fresh_matcher(text)][1])
    constraints = [Constraint(regex(f"a{{{n}}}")) for n in range(1, 6)]
    for constraint in constraints:
        done = threading.Event()
        masks.compile(constraint, done.set)
        assert done.wait(20)
    again = Constraint(constraints[-1].grammar)
    assert masks.keep_if_ready(again) and not masks.keep_if_ready(constraints[0])
    for constraint in [*constraints, again]:
        assert masks_of(masks, GrammarState(constraint), []).errors == {}
    assert len(compiled) == 5
    del constraint, constraints, again
    for worker in (masks._compiling, masks._computing):
        worker.submit(lambda: None).result(20)  # it is done with the last one
    gc.collect()
    assert vocabulary._prepared == {}


@pytest.mark.parametrize("at_mask", [False, True])
def test_a_matcher_that_fails_under_a_draft_forbids_no_token_and_frees_no_row(
    vocabulary: GrammarVocabulary, monkeypatch: pytest.MonkeyPatch, at_mask: bool
):
    """Others use up the lexer when the first row's mask is there, or when a draft's token is taken."""
    tokens = words(44)
    masks, draft = Masks(lambda: vocabulary), (*tokens[40:], BANG, A)
    expected = masks_of(Masks(byte_vocabulary), GrammarState(WORDS), tokens[:40], draft)
    name = "mask" if at_mask else "follow_draft"
    usual = getattr(masks_module._Step, name)

    def disturbed(*args: object) -> None:
        if not used:
            exhaust(vocabulary)
            used.append(True)
        usual(*args)

    used = list[bool]()
    monkeypatch.setattr(masks_module._Step, name, disturbed)
    got = masks_of(masks, GrammarState(WORDS), tokens[:40], draft)
    assert got.errors == expected.errors == {}
    assert torch.equal(got.allowed, expected.allowed)
    allowed = token_bits(got.allowed, vocabulary.width)
    assert not allowed[:5, BANG].any() and allowed[:5, A].all() and allowed[5:].all()
