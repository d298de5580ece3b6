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
import time

import torch
from batches import BATCH_TOKENS, CONTEXT, LONG_SEQUENCE, SHORT_SEQUENCE, Stream, weighted_loss
from checkpoint import restore, write
from data import train_tokenizer
from evaluation import SAMPLES, answer, evaluate
from model import CONFIG, Model, Rounding
from optimisation import CYCLES, Cycle, Muon
from safetensors.torch import load_file
from torch import nn

MTP_WEIGHT = 0.3


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    total = sum(cycle.steps for cycle in CYCLES)
    parser.add_argument("--steps", type=int, default=total, help="in all; other numbers stretch the cycles")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    tokenizer = train_tokenizer(CONFIG["vocab_size"], args.seed)
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
