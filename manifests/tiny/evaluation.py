"""Figures and sample answers of the trained model, on documents that it was not trained on."""

from __future__ import annotations

import torch
from batches import BATCH_TOKENS, LONG_SEQUENCE, Stream, weighted_loss
from dialogue import prompt, user
from model import CONFIG, Model
from tokenizers import Tokenizer

SAMPLES = [
    "What is 3 + 4?",
    "Hello!",
    "Who are you?",
    "What day comes after Monday?",
    "Spell cluster.",
    "Count to 12.",
    "Write the times table of 7 up to 5.",
    "How many minutes are in 3 hours?",
    "What is the capital of Japan?",
    "Answer in JSON: what is 12 + 30?",
    "Think step by step: what is 127 + 58?",
    "Tell me about the moon.",
    "Tell me a short story.",
    "Write a Python function that adds two numbers.",
    "Which is larger, 17 or 71?",
]


@torch.no_grad()
def evaluate(model: Model, stream: Stream, batches: int = 12, documents: int = 1500) -> dict[str, object]:
    """Held-out figures in float32 on the stored weights.

    Loss, expert load and MTP acceptance come from packed sequences; an acceptance is the MTP layer's argmax for t+2
    being the main model's own, given the true tokens up to t+1. Accuracy takes each dialogue by itself: right when
    greedy decoding would give every token of its assistant's turns.
    """
    losses, agree, load = [], torch.zeros(4), torch.zeros(len(model.moe()), CONFIG["n_routed_experts"])
    for _ in range(batches):
        tokens, weights = stream.batch(BATCH_TOKENS // LONG_SEQUENCE, LONG_SEQUENCE)
        logits, ahead = model(tokens, mtp=True)
        losses.append(weighted_loss(logits, tokens, weights.clone(), 1).item())
        same = ahead[:, :-2].argmax(-1) == logits[:, 1:-1].argmax(-1)
        spoken = weights[:, 2:] == 1
        agree += torch.tensor([same.sum(), same.numel(), same[spoken].sum(), spoken.sum()])
        load += torch.stack([moe.load for moe in model.moe()])
    tasks: dict[str, list[bool]] = {}
    items = sorted(
        (item for item in stream.documents(documents) if item[0].exact and len(item[1]) < 600),
        key=lambda item: len(item[1]),
    )
    for start in range(0, len(items), 16):
        chunk = items[start : start + 16]
        padded = torch.zeros(len(chunk), len(chunk[-1][1]), dtype=torch.long)
        for row, (_, ids, _) in zip(padded, chunk, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        best = model(padded)[0].argmax(-1)
        for row, (doc, ids, weights) in zip(best, chunk, strict=True):
            right = all(int(row[i - 1]) == ids[i] for i in range(1, len(ids)) if weights[i] == 1)
            tasks.setdefault(doc.task, []).append(right)
    first = CONFIG["first_k_dense_replace"]
    return dict(
        held_out_loss=round(sum(losses) / len(losses), 4),
        max_over_mean_load={f"layer {i}": round(float(row.max() / row.mean()), 3) for i, row in enumerate(load, first)},
        mtp_acceptance=dict(
            assistant_tokens=round(float(agree[2] / agree[3]), 4), all_tokens=round(float(agree[0] / agree[1]), 4)
        ),
        accuracy={task: f"{sum(right)}/{len(right)}" for task, right in sorted(tasks.items())},
    )


@torch.no_grad()
def answer(model: Model, tokenizer: Tokenizer, question: str, limit: int = 120) -> str:
    """The greedy answer to one user message."""
    ids = tokenizer.encode(prompt([user(question)]), add_special_tokens=False).ids
    start = len(ids)
    while len(ids) < start + limit and ids[-1] != CONFIG["eos_token_id"]:
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return tokenizer.decode([i for i in ids[start:] if i != CONFIG["eos_token_id"]], skip_special_tokens=False)
