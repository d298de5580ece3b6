"""Constrained streams of the bundled model: by their grammar to the last token, the same however they are cut, batched,
drafted or preempted, and no other stream is touched."""

from __future__ import annotations

import json
import queue
import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from drafters import Guesser, always
from grammars import (
    BYTES_END,
    Output,
    accepts,
    byte_tokenizer,
    chat_ids,
    constrained,
    output,
    outputs,
    tiny_engine,
    tiny_tokenizer,
    tiny_vocabulary,
)
from llguidance import LLMatcher

from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.grammar_state import GrammarState
from isotherm.actors.attention.masks import Ask, Masks
from isotherm.actors.attention.sampling import Sampler
from isotherm.actors.attention.step_loop import StepLoop
from isotherm.cluster.engine.sequence import ScheduledSequence
from isotherm.cluster.messages.requests import Constraint, Delta, FinishReason, GenerationRequest
from isotherm.cluster.text.grammar import choice, json_object, json_schema, regex
from isotherm.cluster.text.grammar_vocabulary import GrammarVocabulary
from isotherm.kernels.ops import token_bits
from isotherm.kernels.reference import ReferenceKernels

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "sure": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "sure"],
    "additionalProperties": False,
}
SUM = chat_ids("What is 3 + 4?")
STORY = chat_ids("Tell me a story.")
GRAMMARS = {
    "schema": json_schema(PERSON),
    "regex": regex(r"[a-z]{3,9}( [a-z]{2,9}){2,6}\."),
    "choice": choice(["seven", "seventeen", "seventy", "eight"]),
    "lark": 'start: item ("," item)*\nitem: NAME "=" /[0-9]{1,3}/\nNAME: /[a-z]{1,5}/\n',
}
EOS = min(tiny_tokenizer().eos_token_ids)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


def lone(engine: Engine, name: str, **params: object) -> Output:
    asked = {"temperature": 1.0, "max_tokens": 60, **params}
    return output(engine, constrained("a", SUM, GRAMMARS[name], **asked))


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_what_ends_by_itself_is_whole_by_its_grammar(engine: Engine, name: str, temperature: float):
    got = [lone(engine, name, temperature=temperature, seed=seed, max_tokens=120) for seed in range(4)]
    whole = [one for one in got if one.reason is FinishReason.STOP]
    assert all(one.reason in (FinishReason.STOP, FinishReason.LENGTH) for one in got)
    assert whole or temperature == 0.0
    for one in whole:
        assert one.tokens[-1] == EOS and EOS not in one.tokens[:-1]
        matcher = tiny_vocabulary().compiled(GRAMMARS[name]).copy()
        assert matcher.consume_tokens(one.tokens[:-1]) and matcher.is_accepting(), one.text


def test_what_is_cut_off_says_so(engine: Engine):
    got = lone(engine, "schema", max_tokens=5)
    assert got.reason is FinishReason.LENGTH and len(got.tokens) == 5 and got.text.startswith('{"name":')


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_stream_that_is_resumed_anywhere_goes_on_as_it_was(engine: Engine, name: str):
    """After a move or a death another engine has the output's tokens, and nothing else."""
    whole = lone(engine, name)
    for cut in range(1, len(whole.tokens)):
        request = replace(
            constrained("a", SUM, GRAMMARS[name], temperature=1.0, max_tokens=60), generated=tuple(whole.tokens[:cut])
        )
        assert output(engine, request).tokens == whole.tokens[cut:], cut


def test_a_mask_depends_on_the_tokens_before_it_alone():
    """Computed in one go or token by token, after drafts right and wrong, by a new matcher or a copied one."""
    rng = random.Random(5)
    vocabulary = tiny_vocabulary()
    masks = Masks(lambda: vocabulary)
    for name, grammar in GRAMMARS.items():
        constraint, tokens = Constraint(grammar), list[int]()
        stepwise = GrammarState(constraint)
        for _ in range(25):
            draft = tuple(rng.randrange(vocabulary.size) for _ in range(rng.randint(0, 3)))
            of(masks, Ask(0, stepwise, tokens, 0, (EOS,), draft))
            at_once = GrammarState(constraint)
            mask = of(masks, Ask(0, at_once, tokens, 0, (EOS,)))[0]
            again = of(masks, Ask(0, stepwise, tokens, 0, (EOS,)))[0]
            fresh = vocabulary.fresh_matcher(grammar)
            fresh.consume_tokens(tokens)
            assert torch.equal(mask, again) and torch.equal(mask, torch.from_numpy(forbidden(fresh))), (
                name,
                tokens,
            )
            allowed = (~mask).nonzero().flatten().tolist()
            if allowed == [EOS]:
                break
            tokens.append(rng.choice([token for token in allowed if token != EOS]))


def test_a_wrong_draft_leaves_no_mask_behind():
    """After it the lexer is where it is after the right token, and the parser is not."""
    tokenizer = byte_tokenizer(("a", ")"), ("a)", "x"), ("a)", "y"))
    wrong, right, first, second = (tokenizer.encode(text).ids[0] for text in ("(", "[", "a)x", "a)y"))
    constraint = Constraint('start: "(" A ")" "x" | "[" A ")" "y"\nA: /[ab]/\n')
    vocabulary = GrammarVocabulary(tokenizer.to_str, BYTES_END, tokenizer.get_vocab_size())
    masks, state = Masks(lambda: vocabulary), GrammarState(constraint)
    drafted = of(masks, Ask(0, state, [], 0, (BYTES_END,), (wrong,)))
    assert not drafted[1, first] and drafted[1, second]
    mask = of(masks, Ask(0, state, [right], 0, (BYTES_END,)))[0]
    assert mask[first] and not mask[second]


def of(masks: Masks, ask: Ask) -> torch.Tensor:
    """Which tokens are forbidden, bool [rows, V]."""
    return ~token_bits(masks.begin(lambda: [ask])().allowed, masks._loaded().width)


def forbidden(matcher: LLMatcher) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return bits[: tiny_vocabulary().size] == 0


def test_masks_do_not_wait_for_a_thread_that_does_not_come_to_them():
    masks, held = Masks(tiny_vocabulary), threading.Event()
    ask = Ask(0, GrammarState(Constraint(GRAMMARS["choice"])), [], 0, (EOS,))
    begun = threading.Event()

    def busy() -> list[Ask]:
        begun.set()
        assert held.wait(20)
        return []

    masks._computing.submit(busy)
    assert begun.wait(20)
    got = masks.begin(lambda: [ask])()
    held.set()
    assert torch.equal(got.allowed, masks.begin(lambda: [ask])().allowed)


class Guesses(Guesser):
    """Drafts of what is known to come, with mistakes."""

    def __init__(self, known: dict[str, list[int]], right: float):
        self.known, self.right, self.rng = known, right, random.Random(3)

    def guess(self, sequence: ScheduledSequence, most: int) -> Sequence[int]:
        guessed = self.known[sequence.request.id][sequence.generated :][: self.rng.randint(0, 5)]
        return [t if self.rng.random() < self.right else self.rng.randrange(1280) for t in guessed]


@pytest.mark.parametrize("right", [1.0, 0.6, 0.0])
def test_drafts_change_nothing(engine: Engine, right: float):
    requests = batch()
    expected = outputs(engine, *requests)
    drafter = Guesses({name: one.tokens for name, one in expected.items()}, right)
    drafted = Engine(engine.model, engine.experts, engine.scheduler.config, always(drafter), engine.sampler)
    before = drafted.steps
    assert outputs(drafted, *requests) == expected
    assert right == 0.0 or drafted.steps - before < max(len(one.tokens) for one in expected.values())


def batch() -> list[GenerationRequest]:
    """Constrained and other streams in turn, with processors and without."""
    close = tiny_tokenizer().token_id("</think>")
    asked = [
        (SUM, "schema", {"temperature": 1.0}),
        (STORY, None, {"temperature": 1.0}),
        (SUM, "regex", {"temperature": 1.5, "presence_penalty": 1.0, "logprobs": 2}),
        (STORY, None, {"temperature": 0.0, "logprobs": 1}),
        (SUM, "choice", {"temperature": 0.0}),
        (chat_ids("What is 3 + 4?", thinking=True), "schema", {"temperature": 1.0, "after": (close,)}),
        (STORY, None, {"temperature": 1.0, "min_p": 0.1}),
        (SUM, "lark", {"temperature": 2.0, "logit_bias": ((EOS, -3.0),), "top_k": 20}),
    ]
    return [
        constrained(str(i), prompt, None if name is None else GRAMMARS[name], max_tokens=50, seed=i, **params)
        for i, (prompt, name, params) in enumerate(asked)
    ]


def test_a_batch_changes_no_stream(engine: Engine):
    requests = batch()
    together = outputs(engine, *requests)
    assert together == {request.id: output(engine, request) for request in requests}
    assert all(one.reason in (FinishReason.STOP, FinishReason.LENGTH) for one in together.values())


def test_preemption_changes_no_stream(engine: Engine):
    requests = batch()
    expected = outputs(engine, *requests)
    config = replace(engine.scheduler.config, blocks=40)
    tight = Engine(engine.model, engine.experts, config, sampler=engine.sampler)
    rng = random.Random(1)
    got = {request.id: list[int]() for request in requests}
    for request in requests:
        tight.scheduler.add(request)
    while len(tight.scheduler):
        if tight.scheduler.running and rng.random() < 0.2:
            tight.scheduler.preempt(rng.choice(tight.scheduler.running).request.id)
        for delta in tight.step():
            got[delta.request_id] += delta.token_ids
    assert tight.scheduler.preemptions > 5
    assert got == {name: one.tokens for name, one in expected.items()}


def test_logprobs_are_the_models_own(engine: Engine):
    """As of the same text without a constraint."""
    got = output(engine, constrained("a", SUM, GRAMMARS["choice"], logprobs=1, temperature=1.0))
    free = constrained("b", SUM, None, logprobs=1, temperature=1.0, max_tokens=1)
    assert got.logprobs[0].top == output(engine, free).logprobs[0].top
    assert len(got.logprobs) == len(got.tokens)


def test_the_constraint_begins_after_the_thought(engine: Engine):
    close = tiny_tokenizer().token_id("</think>")
    prompt = chat_ids("What is 3 + 4?", thinking=True)
    for temperature in (0.0, 1.0):
        request = constrained("a", prompt, GRAMMARS["schema"], after=(close,), temperature=temperature, max_tokens=250)
        got = output(engine, request)
        assert got.tokens.count(close) == 1 and got.reason is FinishReason.STOP
        text = tiny_tokenizer().decode(got.tokens[got.tokens.index(close) + 1 :])
        assert json.loads(text)["age"] <= 120
    free = output(engine, constrained("b", prompt, None, temperature=0.0, max_tokens=250))
    held = output(engine, constrained("c", prompt, GRAMMARS["schema"], after=(close,), temperature=0.0, max_tokens=250))
    end = free.tokens.index(close)
    assert held.tokens[: end + 1] == free.tokens[: end + 1], "the thought is free"


def test_a_thought_cannot_end_the_text(engine: Engine):
    close = tiny_tokenizer().token_id("</think>")
    never = ((close, -100.0), (EOS, 100.0))
    request = constrained("a", SUM, GRAMMARS["choice"], after=(close,), logit_bias=never, max_tokens=20)
    assert output(engine, request).reason is FinishReason.LENGTH


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_gives_way_to_a_grammar_that_must_end(engine: Engine, temperature: float):
    request = constrained("a", SUM, choice(["yes"]), min_tokens=30, temperature=temperature, max_tokens=40)
    got = output(engine, request)
    assert (got.text, got.reason) == ("yes", FinishReason.STOP)
    more = output(engine, constrained("b", SUM, regex("(ab)+"), min_tokens=12, max_tokens=40, temperature=temperature))
    assert len(more.tokens) > 12 and set(more.text) == {"a", "b"}


def test_tokens_that_the_request_ends_by_are_allowed_where_the_text_may_end(engine: Engine):
    stop = tiny_tokenizer().token_id("<｜User｜>")
    bias = ((stop, 100.0),)
    request = constrained("a", SUM, regex("a{2,9}"), stop_token_ids=(stop,), logit_bias=bias, temperature=0.0)
    got = output(engine, request)
    text = tiny_tokenizer().decode(got.tokens[:-1])
    assert got.reason is FinishReason.STOP and got.tokens[-1] == stop and set(text) == {"a"} and len(text) >= 2


def test_a_request_for_which_nothing_can_follow_ends_alone(engine: Engine):
    """The others go on to the same tokens, and the error names the grammar."""
    plain = constrained("plain", STORY, None, temperature=1.0, max_tokens=20)
    whole = constrained("whole", SUM, GRAMMARS["schema"], temperature=1.0, max_tokens=20)
    expected = outputs(engine, plain, whole)
    endless = constrained("endless", SUM, choice(["yes"]), stop_token_ids=(), max_tokens=20)
    broken = constrained("broken", SUM, "start: nowhere", max_tokens=20)
    got = outputs(engine, plain, endless, whole, broken)
    assert {name: got[name] for name in expected} == expected
    assert got["endless"].reason is FinishReason.ERROR and "no token that ends it" in got["endless"].error
    assert got["endless"].text == "yes"
    assert got["broken"].reason is FinishReason.ERROR and "'start: nowhere'" in got["broken"].error


def test_a_step_loop_has_the_grammar_compiled_first(engine: Engine):
    """As a shard does it: in another thread, and then the stream is what it is anywhere."""
    request = constrained("a", SUM, regex("[a-z]{4,9}!?"), temperature=1.0)
    expected = output(engine, request)
    masks, published = Masks(lambda: tiny_tokenizer().grammar_vocabulary(1280)), queue.Queue[list[Delta]]()
    assert request.params.constraint is not None and not masks.keep_if_ready(request.params.constraint)
    sampler = Sampler(engine.model.kernels, masks)
    loop = StepLoop(Engine(engine.model, engine.experts, engine.scheduler.config, sampler=sampler), published.put)
    loop.submit(request)
    deltas: list[Delta] = []
    while not deltas or deltas[-1].finish_reason is None:
        deltas += published.get(timeout=30)
    assert [token for delta in deltas for token in delta.token_ids] == expected.tokens
    assert masks.keep_if_ready(request.params.constraint)


def test_an_engine_without_a_tokenizer_says_so(engine: Engine):
    plain = Engine(engine.model, engine.experts, engine.scheduler.config, sampler=Sampler(engine.model.kernels))
    got = outputs(plain, constrained("a", SUM, GRAMMARS["choice"]), constrained("b", SUM, None, max_tokens=3))
    assert "no tokenizer" in got["a"].error and len(got["b"].tokens) == 3
    unloadable = Sampler(engine.model.kernels, Masks(fail))
    plain = Engine(engine.model, engine.experts, engine.scheduler.config, sampler=unloadable)
    got = outputs(plain, constrained("a", SUM, GRAMMARS["choice"]), constrained("b", SUM, None, max_tokens=3))
    assert "tokenizer.json is not there" in got["a"].error and len(got["b"].tokens) == 3


def fail() -> None:
    raise OSError("tokenizer.json is not there")


def test_tokens_beyond_the_tokenizer_are_never_allowed():
    tokenizer = tiny_tokenizer()
    padded = tokenizer.grammar_vocabulary(tokenizer.vocab_size + 77)
    masks = Masks(lambda: padded)
    ask = Ask(0, GrammarState(Constraint(regex("(?s:.*)"))), [], 0, (EOS,))
    mask = of(masks, ask)
    assert mask.shape == (1, tokenizer.vocab_size + 77)
    assert mask[0, tokenizer.vocab_size :].all() and not mask[0].all()


def test_tokens_beyond_the_model_are_never_allowed():
    """Of a tokenizer that has more than the model has logits: its end among them, or what a text needs."""
    tokenizer = tiny_tokenizer()
    close = tokenizer.token_id("</think>")
    assert close is not None
    width = max(EOS, close) + 1
    cut = tokenizer.grammar_vocabulary(width)
    assert cut.size == tokenizer.vocab_size > width
    texts = [GrammarState(Constraint(regex("(?s:.*)"), after)) for after in ((), (close,))]
    asks = [Ask(i, state, [], 0, (EOS, cut.size - 1)) for i, state in enumerate(texts)]
    beyond = Ask(2, GrammarState(Constraint(f"start: <[{width}]>")), [], 0, (EOS,))
    endless = Ask(3, GrammarState(Constraint('start: ""')), [], 0, (cut.size - 1,))
    got = Masks(lambda: cut).begin(lambda: [*asks, beyond, endless])()
    allowed = token_bits(got.allowed, width)
    assert allowed.shape == (4, width) and allowed.any(dim=1).all()
    assert allowed[0, EOS] and not allowed[1, EOS] and allowed[1, close]
    assert set(got.errors) == {2, 3} and all(f"the model, with {width} tokens" in why for why in got.errors.values())
    got.apply(ReferenceKernels(torch.float32), torch.zeros(4, width))


def test_a_model_without_the_tokenizers_end():
    tokenizer = byte_tokenizer()
    vocabulary = GrammarVocabulary(tokenizer.to_str, BYTES_END, 257, 200)
    got = Masks(lambda: vocabulary).begin(lambda: [Ask(0, GrammarState(Constraint(regex("a*"))), [], 0, (7,))])()
    allowed = {tokenizer.encode("a").ids[0], 7}
    assert set(token_bits(got.allowed, 257)[0].nonzero().flatten().tolist()) == allowed and got.errors == {}


def test_json_objects_of_any_kind(engine: Engine):
    got = [
        output(engine, constrained("a", SUM, json_object(), temperature=1.0, seed=seed, max_tokens=300))
        for seed in range(6)
    ]
    whole = [one.text for one in got if one.reason is FinishReason.STOP]
    assert whole and all(isinstance(json.loads(text), dict) for text in whole)
    assert all(accepts(json_object(), text) for text in whole)
