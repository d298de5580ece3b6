"""Figures and sample answers of the trained model, on documents that it was not trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import torch
from batches import Stream, Tokens, guessed_weights, weighted_loss
from dialogue import Doc, prompt, user
from held import Grammars, held_answer
from mix import Mix
from model import CONFIG, Model
from structured import closed_schema_of
from tokenizers import Tokenizer

SAMPLES = [
    "What is 3 + 4?",
    "Hello!",
    "Who are you?",
    "What day comes after Monday?",
    "Spell cluster.",
    "Spell kind.",
    "Reverse the word cluster.",
    "How many r's are in strawberry?",
    "Repeat after me: seven green lanterns",
    "Count to 12.",
    "Write the times table of 7 up to 5.",
    "How many minutes are in 3 hours?",
    "What is the capital of Japan?",
    "Answer in JSON: what is 12 + 30?",
    "Turn this into JSON: Ada is 36 years old and lives in London.",
    "Think step by step: what is 127 + 58?",
    "Tell me about the moon.",
    "Tell me a short story.",
    "Write a Python function that adds two numbers.",
    "Which is larger, 17 or 71?",
]
GUESSES = 4  # that a stream is given in a step, at most


def held_out_stream(tokenizer: Tokenizer, seed: int) -> Stream:
    """What nobody trained on, every kind by its whole weight."""
    return Stream(tokenizer, seed + 4, Mix(), keep_held_out=True)


@torch.no_grad()
def report(
    model: Model, tokenizer: Tokenizer, seed: int, documents: int = 6000, batches: int = 12
) -> dict[str, object]:
    """Held-out figures in float32 on the stored weights.

    Loss, expert load and MTP acceptance come from packed sequences; an acceptance is the MTP layer's argmax for t+2
    being the main model's own, given the true tokens up to t+1. That of the n-th guess, by answer tokens: given that
    the guesses before were the true tokens, of which the layer had its own hidden states.
    """
    stream = held_out_stream(tokenizer, seed)
    right = answered(model, tokenizer, stream.documents(documents))
    return dict(
        parameters=sum(p.numel() for p in model.parameters()),
        **packed_figures(model, stream, batches),
        accuracy=table(right, lambda doc: doc.task),
        by_kind=table(right, lambda doc: doc.kind),
        samples={question: answer(model, tokenizer, question) for question in SAMPLES},
    )


@torch.no_grad()
def packed_figures(model: Model, stream: Stream, batches: int) -> dict[str, object]:
    losses, load = [], torch.zeros(len(model.moe()), CONFIG["n_routed_experts"])
    agree, by_guess = torch.zeros(4), torch.zeros(GUESSES, 2)
    for _ in range(batches):
        batch = stream.batch()
        logits, ahead = model(batch.tokens, GUESSES)
        losses.append(weighted_loss(logits, batch.tokens, batch.weights, 1).item())
        guessed = [one[:, :-2].argmax(-1) == logits[:, 1:-1].argmax(-1) for one in ahead]
        same = guessed[0]
        for n, right in enumerate(guessed):
            asked = guessed_weights(batch, n + 1)[:, 2:] == 1
            by_guess[n] += torch.tensor([right[asked].sum(), asked.sum()])
        spoken, any_of = batch.weights[:, 2:] == 1, batch.documents[:, 2:] >= 0
        agree += torch.tensor([same[any_of].sum(), any_of.sum(), same[spoken].sum(), spoken.sum()])
        load += torch.stack([moe.load for moe in model.moe()])
    first = CONFIG["first_k_dense_replace"]
    return dict(
        held_out_loss=round(sum(losses) / len(losses), 4),
        max_over_mean_load={f"layer {i}": round(float(row.max() / row.mean()), 3) for i, row in enumerate(load, first)},
        mtp_acceptance=dict(
            assistant_tokens=round(float(agree[2] / agree[3]), 4),
            all_tokens=round(float(agree[0] / agree[1]), 4),
            by_guess=[round(float(right / of), 4) for right, of in by_guess],
        ),
    )


@torch.no_grad()
def answered(model: Model, tokenizer: Tokenizer, documents: Iterable[tuple[Doc, Tokens]]) -> list[tuple[Doc, bool]]:
    """Of each dialogue with one right wording, whether greedy decoding gives the text of its answers, in whatever
    tokens; of an answer that a schema holds, whether decoding by its grammar gives the same JSON."""
    grammars = Grammars(tokenizer)
    items = [item for item in documents if item[0].exact and len(item[1].ids) < 900]
    items.sort(key=lambda item: len(item[1].ids))
    out = []
    for start in range(0, len(items), 16):
        chunk = items[start : start + 16]
        padded = torch.zeros(len(chunk), len(chunk[-1][1].ids), dtype=torch.long)
        for row, (_, made) in zip(padded, chunk, strict=True):
            row[: len(made.ids)] = torch.tensor(made.ids)
        best = model(padded)[0].argmax(-1)
        for row, (doc, made) in zip(best, chunk, strict=True):
            same = [int(token) == wanted for token, wanted in zip(row, made.ids[1:], strict=False)]
            right = (
                says_held(model, tokenizer, grammars, doc)
                if doc.held
                else all(
                    all(same[first - 1 : end - 1]) or says(model, tokenizer, made.ids[:first], made.ids[first:end])
                    for first, end in spoken(made)
                )
            )
            out.append((doc, right))
    return out


def says_held(model: Model, tokenizer: Tokenizer, grammars: Grammars, doc: Doc) -> bool:
    """Whether the answer of a dialogue that its schema holds has the values that it should have."""
    *asked, answer = doc.messages
    wanted = json.loads(answer["content"])
    ids = tokenizer.encode(prompt(asked), add_special_tokens=False).ids
    return bool(held_answer(model, tokenizer, ids, grammars.matcher(closed_schema_of(wanted)), 120) == wanted)


def spoken(made: Tokens) -> list[tuple[int, int]]:
    """Where the answers of a dialogue begin and end, in tokens."""
    inside = [weight == 1 for weight in (*made.weights, 0.0)]
    edges = [i for i, (before, now) in enumerate(zip([False, *inside], inside, strict=False)) if before != now]
    return list(zip(edges[::2], edges[1::2], strict=True))


def says(model: Model, tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> bool:
    """Whether greedy decoding after a prompt gives the answer's text, by these tokens or by others."""
    text, said = tokenizer.decode(answer, skip_special_tokens=False), ""
    ids, most = list(prompt), len(prompt) + 4 * len(answer)  # a model may go on with bytes that never make a character
    while text.startswith(said) and said != text and len(ids) < most:
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        said = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=False).rstrip("\ufffd")
    return said == text


def table(answers: list[tuple[Doc, bool]], row: Callable[[Doc], str]) -> dict[str, str]:
    """Right answers of all, by what `row` gives for a document."""
    rows: dict[str, list[bool]] = {}
    for doc, right in answers:
        rows.setdefault(row(doc), []).append(right)
    return {name: f"{sum(right)}/{len(right)}" for name, right in sorted(rows.items())}


@torch.no_grad()
def answer(model: Model, tokenizer: Tokenizer, question: str, limit: int = 120) -> str:
    """The greedy answer to one user message."""
    ids = tokenizer.encode(prompt([user(question)]), add_special_tokens=False).ids
    start = len(ids)
    while len(ids) < start + limit and ids[-1] != CONFIG["eos_token_id"]:
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return tokenizer.decode([i for i in ids[start:] if i != CONFIG["eos_token_id"]], skip_special_tokens=False)
