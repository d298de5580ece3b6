"""The bundled model's table of held-out answers at a reduced size, through the engine that serves it: what the model
card says is what a user gets."""

from __future__ import annotations

import json

import pytest
import torch
from grammars import Output, chat_ids, constrained, outputs, tiny_engine, tiny_tokenizer
from safetensors.torch import load_file
from tiny_recipe import TINY, tiny_recipe

from isotherm.cluster.text.grammar import json_schema

pytestmark = pytest.mark.slow

DOCUMENTS = 300
CARD = json.loads((TINY / "training.json").read_text())
# Of each task, the share of its held-out documents that the weights are to have right at least: the most that a card
# said so far (the last on 2026-11-30), less the margin of so few documents (the lower end of Wilson's interval, two
# standard deviations).
FLOORS = {
    "about": 0.97,
    "arithmetic": 0.98,
    "calendar": 0.98,
    "code": 0.96,
    "counting": 0.98,
    "facts": 0.98,
    "json_answer": 0.98,
    "long": 0.89,
    "numbers": 0.97,
    "poem": 0.92,
    "schema": 0.94,
    "system": 0.96,
    "table": 0.93,
    "thinking": 0.98,
    "tools": 0.97,
    "tools-unused": 0.92,
    "turns": 0.98,
    "units": 0.94,
    "unknown": 0.94,
    "words": 0.97,
}


@pytest.fixture(scope="module")
def recipe():
    with tiny_recipe() as module:
        yield module


@pytest.fixture(scope="module")
def tokenizer(recipe):
    return recipe("tokenizers").Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def documents(recipe, tokenizer):
    """The first ones of those that the card's table was made of."""
    stream = recipe("evaluation").held_out_stream(tokenizer, CARD["seed"])
    made = [(doc, tokens) for doc, tokens in stream.documents(DOCUMENTS) if doc.exact and len(tokens.ids) < 500]
    assert len({doc.kind for doc, _ in made}) > 30
    return made


def asked(recipe, name, doc, tokens):
    """A request for each answer of a dialogue, with the text that it has to be."""
    if doc.held:  # as a server holds it: the schema is not in the prompt, and keys are the grammar's
        text = doc.messages[-1]["content"]
        grammar = json_schema(recipe("structured").closed_schema_of(json.loads(text)))
        yield constrained(name, chat_ids(doc.messages[0]["content"]), grammar, temperature=0.0, max_tokens=80), text
        return
    for first, end in recipe("evaluation").spoken(tokens):
        text = tiny_tokenizer().decode(tokens.ids[first:end], skip_special_tokens=False)
        prompt = tuple(tokens.ids[:first])
        yield constrained(f"{name}-{first}", prompt, None, temperature=0.0, max_tokens=2 * (end - first)), text


def is_right(output: Output, answer: str, held: bool) -> bool:
    text = tiny_tokenizer().decode(output.tokens, skip_special_tokens=held)
    if not held:
        return text == answer
    return bool(text.startswith("{") and text.endswith("}") and json.loads(text) == json.loads(answer))


def test_what_the_card_says_is_what_the_engine_answers(recipe, tokenizer, documents):
    requests = [list(asked(recipe, str(i), doc, tokens)) for i, (doc, tokens) in enumerate(documents)]
    given = outputs(tiny_engine(1024), *(request for of_one in requests for request, _ in of_one))
    served = [
        all(is_right(given[request.id], answer, doc.held) for request, answer in of_one)
        for (doc, _), of_one in zip(documents, requests, strict=True)
    ]

    tensors = load_file(TINY / "model.safetensors")
    with torch.no_grad():
        told = recipe("evaluation").answered(recipe("checkpoint").restore(tensors), tokenizer, documents)
    by_document = {id(doc): right for doc, right in told}
    plain = [by_document[id(doc)] for doc, _ in documents]

    differ = [doc.render() for (doc, _), a, b in zip(documents, served, plain, strict=True) if a != b]
    assert len(differ) <= len(documents) // 25, differ  # bfloat16 decides a close one otherwise
    floors = [FLOORS[doc.task] for doc, _ in documents]
    least = sum(floors) - sum(share * (1 - share) for share in floors) ** 0.5  # few of them are asked
    wrong = [doc.render() for (doc, _), yes in zip(documents, served, strict=True) if not yes]
    assert sum(served) >= least, wrong


def test_the_card_is_no_worse_than_it_was():
    counts = {task: tuple(map(int, said.split("/"))) for task, said in CARD["accuracy"].items()}
    shares = {task: right / of for task, (right, of) in counts.items()}
    assert shares.keys() == FLOORS.keys()
    assert {task: share for task, share in shares.items() if share < FLOORS[task]} == {}


def test_every_guess_of_a_step_is_as_good_as_the_first():
    """Of four, each after those before it were right."""
    assert min(CARD["mtp_acceptance"]["by_guess"]) >= 0.9 and len(CARD["mtp_acceptance"]["by_guess"]) == 4
