"""Train the bundled tiny DeepSeek-V3 model and write it in the hub layout with FP8 block weights.

    python manifests/tiny/train.py --out DIR [--steps N] [--seed 0]

Needs torch, safetensors, tokenizers and jinja2, no accelerator and no network. The forward pass is that of
DeepSeek-V3's published modelling: MLA with interleaved RoPE under YaRN, grouped sigmoid routing with a correction bias,
a shared expert, one multi-token-prediction layer. The matrices train with Muon, the rest with AdamW, and the last steps
of each cycle see the weights as FP8 will store them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import data
import torch
import torch.nn.functional as F
from model import CONFIG, Model, Projection, Rounding, dequantise, quantise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BATCH_TOKENS = 4096
# A token of a short dialogue teaches more than one of a long, so each kind has its own steps; now and then a long
# sequence is one whole context.
SHORT_CHARACTERS, SHORT_SEQUENCE, LONG_SEQUENCE, CONTEXT = 220, 256, 1024, 2048
PROMPT_WEIGHT, MTP_WEIGHT = 0.15, 0.3


@dataclass(frozen=True)
class Cycle:
    """One rise and fall of the learning rates, with fresh optimisers.

    `knots` are (step, share of the peak rates), linear in between; the last one ends the cycle. Every `long_every`-th
    step takes long documents. From step `contexts_from` on, some of those sequences are one context; from
    `rounded_from` on, the weights are rounded to FP8. The correction bias follows the load averaged with weight
    `smoothing` for the newest step.
    """

    matrices: float
    others: float
    embedding: float
    knots: tuple[tuple[int, float], ...]
    contexts_from: int
    rounded_from: int
    long_every: int
    smoothing: float

    @property
    def steps(self) -> int:
        return self.knots[-1][0]

    def share(self, step: int) -> float:
        """The share of the peak rates at a step."""
        after = next(i for i, (knot, _) in enumerate(self.knots) if knot > step)
        (left, low), (right, high) = self.knots[after - 1], self.knots[after]
        return low + (high - low) * (step - left) / (right - left)

    def stretched(self, factor: float) -> Cycle:
        knots = tuple((round(step * factor), share) for step, share in self.knots)
        return replace(
            self,
            knots=knots,
            contexts_from=round(self.contexts_from * factor),
            rounded_from=round(self.rounded_from * factor),
        )


CYCLES = (
    Cycle(0.012, 3e-3, 3e-3, ((0, 0.025), (40, 1.0), (160, 1.0), (800, 0.0)), 400, 680, 5, 1.0),
    Cycle(0.008, 2e-3, 1e-2, ((0, 0.025), (40, 1.0), (180, 1.0), (600, 0.42), (680, 0.0)), 450, 640, 3, 0.1),
)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by five Newton-Schulz steps (Jordan et al., 2024), for stacks of matrices
    [..., R, C]."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, decay: float = 0.02):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, decay=decay))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(average, group["momentum"]).to(torch.bfloat16)
                tall = x.shape[-2] > x.shape[-1]
                x = x.mT if tall else x
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.mT if tall else x
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(x.float(), alpha=-group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)


def weights_of(ids: list[int], special: dict[str, int], forced_think: bool) -> list[float]:
    """Loss weight of each token: 1 in the assistant's turns, PROMPT_WEIGHT elsewhere, 0 where the prompt itself will
    hold the token."""
    out, inside = [], False
    for token in ids:
        out.append(1.0 if inside else PROMPT_WEIGHT)
        if inside and forced_think and token == special[data.THINK]:
            out[-1] = 0.0
        if token in (special[data.ASSISTANT], special["<｜tool▁output▁end｜>"]):
            inside = True
        elif token == special[data.EOS]:
            inside = False
    if special[data.USER] not in ids:
        return [1.0] * len(ids)
    return out


class Stream:
    """Endless packed sequences of documents, positions running through; of short ones, of long ones or of all. Knows
    nothing about the model."""

    def __init__(self, tokenizer, seed: int, keep_held_out: bool = False, short: bool | None = None):
        self.short = short
        self.random, self.tokenizer, self.keep_held_out = random.Random(seed), tokenizer, keep_held_out
        self.special = {s: tokenizer.token_to_id(s) for s in data.SPECIALS}
        self.ids: list[int] = []
        self.weights: list[float] = []

    def draw(self) -> data.Doc:
        while True:
            doc = data.document(self.random)
            fits = self.short is None or self.short == (len(doc.render()) < SHORT_CHARACTERS)
            if fits and data.held_out(doc) == self.keep_held_out:
                return doc

    def documents(self, count: int) -> Iterator[tuple[data.Doc, list[int], list[float]]]:
        docs = [self.draw() for _ in range(count)]
        encoded = self.tokenizer.encode_batch([doc.render() for doc in docs], add_special_tokens=False)
        for doc, encoding in zip(docs, encoded, strict=True):
            yield doc, encoding.ids, weights_of(encoding.ids, self.special, doc.task == "thinking-switch")

    def batch(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """tokens [rows, length] and their loss weights [rows, length]."""
        need = rows * length
        while len(self.ids) < need:
            for _, ids, weights in self.documents(256):
                self.ids += ids
                self.weights += weights
        tokens, weights = torch.tensor(self.ids[:need]), torch.tensor(self.weights[:need])
        del self.ids[:need], self.weights[:need]
        return tokens.view(rows, length), weights.view(rows, length)


def weighted_loss(logits: Tensor, tokens: Tensor, weights: Tensor, ahead: int) -> Tensor:
    """Mean loss of predicting the token `ahead` positions later; the last `ahead` weigh nothing, cheaper than slicing
    the logits."""
    targets, weights = tokens.roll(-ahead, 1), weights.roll(-ahead, 1)
    weights[:, -ahead:] = 0
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (loss * weights.flatten()).sum() / weights.sum()


def plan(step: int, cycle: Cycle) -> tuple[bool, int, bool]:
    """Of a step: whether it takes short dialogues, its sequence length, and whether a sequence is one context."""
    if step % cycle.long_every < cycle.long_every - 1:
        return True, SHORT_SEQUENCE, False
    whole = step > cycle.contexts_from and step // cycle.long_every % 4 == 3
    return False, CONTEXT if whole else LONG_SEQUENCE, whole


def train(model: Model, streams: dict[bool, Stream], cycle: Cycle) -> dict[str, float]:
    """AdamW and Muon through one cycle; returns the mean losses of its last 50 steps."""
    matrices = [
        p
        for name, p in model.named_parameters()
        if name.startswith("layers.") and p.ndim > 1 and ".gate.weight" not in name
    ]
    embedding = model.embed_tokens.weight
    others = [p for p in model.parameters() if not any(p is known for known in (*matrices, embedding))]
    muon = Muon(matrices, lr=cycle.matrices)
    groups = [dict(params=[embedding], lr=cycle.embedding), dict(params=others, lr=cycle.others)]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    base = [(group, group["lr"]) for optimizer in (muon, adam) for group in optimizer.param_groups]
    load = [torch.zeros(CONFIG["n_routed_experts"]) for _ in model.moe()]
    last: list[tuple[float, float]] = []
    started = time.time()
    for step in range(cycle.steps):
        Rounding.on = step >= cycle.rounded_from
        for group, lr in base:
            group["lr"] = lr * cycle.share(step)
        short, length, one_context = plan(step, cycle)
        tokens, weights = streams[short].batch(BATCH_TOKENS // length, length)
        with torch.autocast("cpu", torch.bfloat16):
            logits, ahead = model(tokens, mtp=True, one_context=one_context)
        main = weighted_loss(logits, tokens, weights, 1)
        mtp = weighted_loss(ahead, tokens, weights, 2)
        (main + MTP_WEIGHT * mtp).backward()
        nn.utils.clip_grad_norm_([embedding, *others], 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        rate = 1e-2 if step < 80 else 1e-3
        for moe, average in zip(model.moe(), load, strict=True):
            average.lerp_(moe.load, cycle.smoothing)
            moe.gate.e_score_correction_bias += rate * (average.mean() - average).sign()
        last = [*last[-49:], (main.item(), mtp.item())]
        if step % 25 == 24 or step == cycle.steps - 1:
            worst = max(float(average.max() / average.mean()) for average in load)
            mean = [sum(x) / len(x) for x in zip(*last[-25:], strict=True)]
            print(
                f"step {step + 1:5d}  loss {mean[0]:.3f}  mtp {mean[1]:.3f}  max/mean load {worst:.2f}  "
                f"{time.time() - started:6.0f} s",
                flush=True,
            )
    Rounding.on = False
    mean = [sum(x) / len(x) for x in zip(*last, strict=True)]
    return dict(loss=round(mean[0], 4), mtp_loss=round(mean[1], 4), seconds=round(time.time() - started))


@torch.no_grad()
def even_out(model: Model, stream: Stream, batches: int = 80) -> None:
    """Moves the correction biases alone: now that the routers stand still, the load settles instead of chasing them."""
    load = [torch.zeros(CONFIG["n_routed_experts"]) for _ in model.moe()]
    for i in range(batches):
        with torch.autocast("cpu", torch.bfloat16):
            model(stream.batch(BATCH_TOKENS // LONG_SEQUENCE, LONG_SEQUENCE)[0], mtp=True)
        for moe, average in zip(model.moe(), load, strict=True):
            average.lerp_(moe.load, 0.2)
            moe.gate.e_score_correction_bias += 4e-3 * (1 - i / batches) * (average.mean() - average).sign()


def checkpoint(model: Model) -> dict[str, Tensor]:
    """The model's tensors under DeepSeek's published names and types; embedding and head are shared with the MTP layer
    and stored once."""
    tensors: dict[str, Tensor] = {}

    def projection(name: str, weight: Tensor) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = (t.contiguous() for t in quantise(weight))

    for name, value in model.state_dict().items():
        prefix, leaf = name.rsplit(".", 1)
        full = name if prefix == "lm_head" else f"model.{name}"
        if leaf in ("gate_up", "down"):
            parts = ("gate_proj", "up_proj") if leaf == "gate_up" else ("down_proj",)
            for e, expert in enumerate(value.view(value.shape[0], len(parts), *value.shape[-2:])):
                for part, weight in zip(parts, expert, strict=True):
                    projection(f"model.{prefix}.experts.{e}.{part}", weight)
        elif isinstance(model.get_submodule(prefix), Projection):
            projection(f"model.{prefix}", value)
        else:
            tensors[full] = value.clone() if leaf == "e_score_correction_bias" else value.to(torch.bfloat16)
    return tensors


def restore(tensors: dict[str, Tensor]) -> Model:
    """A float32 model holding just what `checkpoint` stored."""

    def read(name: str) -> Tensor:
        scale = tensors.get(f"{name}_scale_inv")
        return tensors[name].float() if scale is None else dequantise(tensors[name], scale)

    model, state = Model(), {}
    for name in model.state_dict():
        prefix, leaf = name.rsplit(".", 1)
        stored = name if prefix == "lm_head" else f"model.{name}"
        experts = [f"model.{prefix}.experts.{e}" for e in range(CONFIG["n_routed_experts"])]
        if leaf == "gate_up":
            state[name] = torch.stack(
                [torch.stack([read(f"{e}.gate_proj.weight"), read(f"{e}.up_proj.weight")]) for e in experts]
            )
        elif leaf == "down":
            state[name] = torch.stack([read(f"{e}.down_proj.weight") for e in experts])
        else:
            state[name] = read(stored)
    model.load_state_dict(state)
    return model.eval()


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
def answer(model: Model, tokenizer, question: str, limit: int = 120) -> str:
    """The greedy answer to one user message."""
    ids = tokenizer.encode(data.prompt([data.user(question)]), add_special_tokens=False).ids
    start = len(ids)
    while len(ids) < start + limit and ids[-1] != CONFIG["eos_token_id"]:
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return tokenizer.decode([i for i in ids[start:] if i != CONFIG["eos_token_id"]], skip_special_tokens=False)


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


def write(out: pathlib.Path, model: Model, tokenizer) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint(model), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {name: CONFIG[name] for name in ("bos_token_id", "eos_token_id")}
    files = {
        "config.json": CONFIG,
        "generation_config.json": dict(ids, do_sample=False),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=data.BOS,
            eos_token=data.EOS,
            pad_token=data.PAD,
            unk_token=None,
            add_bos_token=True,
            add_eos_token=False,
            clean_up_tokenization_spaces=False,
            model_max_length=CONFIG["max_position_embeddings"],
            chat_template=data.CHAT_TEMPLATE,
        ),
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    total = sum(cycle.steps for cycle in CYCLES)
    parser.add_argument("--steps", type=int, default=total, help="in all; other numbers stretch the cycles")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    tokenizer = data.train_tokenizer(CONFIG["vocab_size"], args.seed)
    model, seconds = Model(), 0
    for i, cycle in enumerate(CYCLES):
        streams = {short: Stream(tokenizer, args.seed + 1 + 10 * i, short=short) for short in (True, False)}
        figures = train(model, streams, cycle.stretched(args.steps / total))
        seconds += figures["seconds"]
    even_out(model, Stream(tokenizer, args.seed + 3))
    write(args.out, model, tokenizer)
    stored = restore(load_file(args.out / "model.safetensors"))
    parameters = sum(p.numel() for p in model.parameters())
    report = dict(
        steps=args.steps,
        seed=args.seed,
        tokens=args.steps * BATCH_TOKENS,
        parameters=parameters,
        **figures | {"seconds": seconds},
        **evaluate(stored, Stream(tokenizer, args.seed + 2, keep_held_out=True)),
        samples={question: answer(stored, tokenizer, question) for question in SAMPLES},
    )
    (args.out / "training.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
