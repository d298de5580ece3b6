"""Train the bundled tiny DeepSeek-V3 model, and write it in the hub layout with FP8 block weights.

    python manifests/tiny/train.py --state FILE [--steps N] [--start DIR] [--seed 0]
    python manifests/tiny/train.py --state FILE --out DIR [--decay M]

The first trains up to step N at constant rates. It may be ended at any time (SIGTERM, Ctrl-C, a lost machine) and goes
on from FILE with the numbers that it would have had. The second makes a model of FILE as it is now: in M further steps
(a tenth of those so far) the rates fall to nothing; FILE stays, and can be trained on. What is interrupted goes on too,
from FILE.decay, as long as FILE is as it was.

Needs torch, safetensors, tokenizers and jinja2, no accelerator (with one, --device cuda) and no network. The forward
pass is that of DeepSeek-V3's published modelling: MLA with interleaved RoPE under YaRN, grouped sigmoid routing with a
correction bias, a shared expert, one multi-token-prediction layer. The matrices train with Muon, the rest with AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable

import torch
from batches import BATCH_TOKENS, Stream
from checkpoint import restore, write
from data import KINDS
from evaluation import report
from fusion import Fusion
from mix import Mix
from model import CONFIG, Model
from optimisation import Rates
from run import Run, step_of
from safetensors.torch import load_file
from tokenizers import Tokenizer

HERE = pathlib.Path(__file__).parent
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def train(run: Run, until: int, file: pathlib.Path, minutes: float, stopped: Callable[[], bool]) -> bool:
    """Steps up to `until`, or until it is `stopped`; saved every so many minutes and at the end. Whether it came to
    `until`."""
    saved = time.monotonic()
    losses: list[tuple[float, float]] = []
    while run.step < until and not stopped():
        losses.append(run.advance())
        if run.step % 25 == 0:
            loss, mtp = (sum(x) / len(x) for x in zip(*losses, strict=True))
            worst = max(float(load.max() / load.mean()) for load in run.load)
            print(
                f"{time.strftime('%H:%M:%S')}  step {run.step:6d}  loss {loss:.4f}  mtp {mtp:.4f}  "
                f"max/mean load {worst:.2f}  cpu {time.process_time():.0f} s",
                flush=True,
            )
            losses.clear()
        if run.step % 250 == 0:
            print("  wrong: " + "  ".join(f"{k} {v:.2f}" for k, v in sorted(run.mix.wrong.items())), flush=True)
        if time.monotonic() - saved > 60 * minutes:
            run.save(file)
            saved = time.monotonic()
    run.save(file)
    return run.step >= until


@torch.no_grad()
def even_out(run: Run, stream: Stream, batches: int = 40) -> None:
    """Moves the correction biases alone: now that the routers stand still, the load settles instead of chasing them."""
    model = run.model
    load = [torch.zeros(CONFIG["n_routed_experts"], device=run.device) for _ in model.moe()]
    for i in range(batches):
        with run.autocast():
            model(stream.batch().tokens.to(run.device), passes=1)
        for moe, average in zip(model.moe(), load, strict=True):
            average.lerp_(moe.load, 0.2)
            moe.gate.e_score_correction_bias += 4e-3 * (1 - i / batches) * (average.mean() - average).sign()


def finish(run: Run, tokenizer: Tokenizer, out: pathlib.Path) -> None:
    """The model's files, and what it can do by them."""
    even_out(run, Stream(tokenizer, run.seed + 3, Mix()))
    write(out, run.model, tokenizer)
    made = report(restore(load_file(out / "model.safetensors")), tokenizer, run.seed)
    head = dict(steps=run.before["steps"] + run.step, seed=run.seed, tokens=run.before["tokens"] + run.tokens)
    text = json.dumps(head | made, indent=2, ensure_ascii=False)
    (out / "training.json").write_text(text + "\n")
    print(text)


def wrong_shares(right: dict[str, str]) -> dict[str, float]:
    """Of figures like "3/4", right ones of all, the shares of wrong ones."""
    counts = {kind: tuple(map(int, text.split("/"))) for kind, text in right.items()}
    return {kind: 1 - yes / of for kind, (yes, of) in counts.items()}


def more_of(text: str) -> tuple[str, float]:
    """KIND=TIMES, as --more has it."""
    kind, _, said = text.partition("=")
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f"{kind!r} is no kind of document; there are {', '.join(sorted(KINDS))}")
    try:
        times = float(said)
    except ValueError:
        times = math.nan
    if not 0 < times < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=TIMES, as in {kind}=4")
    return kind, times


def begin_decay(run: Run, state: pathlib.Path, file: pathlib.Path, steps: int | None) -> None:
    """Make the run the decay of a state: where one was interrupted, that one, of `file`."""
    goes_on = file.exists()
    run.restore(file if goes_on else state)
    if run.decay is None:
        run.decay = (run.step, steps or max(1, run.step // 10))
    if not goes_on:
        return
    begin, length = run.decay
    if (now := step_of(state)) != begin:
        wrong = f"{state} is at step {now}"
    elif steps not in (None, length):
        wrong = f"--decay is {steps}"
    else:
        return
    sys.exit(
        f"{file} is a decay of {length} steps from step {begin} on that was interrupted, and {wrong}; delete it to "
        "begin anew"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=pathlib.Path, required=True, help="what to go on from, and to save to")
    parser.add_argument("--steps", type=int, default=20000, help="how many in all at constant rates")
    parser.add_argument("--start", type=pathlib.Path, help="a model to begin with instead of random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--more", type=more_of, action="append", default=[], metavar="KIND=TIMES", help="draw a kind so much oftener"
    )
    parser.add_argument("--peak", type=float, default=1.0, help="of the rates; lower where --start has a trained model")
    parser.add_argument("--minutes", type=float, default=10, help="between two savings of the state")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=BATCH_TOKENS, help="tokens a step")
    parser.add_argument(
        "--loaders", type=int, default=0, help="processes that draw documents ahead, for a quick device"
    )
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of products; auto: the quick one")
    parser.add_argument("--threads", type=int, default=1, help="more help where nothing else computes")
    parser.add_argument("--compile", action="store_true", help="fuse small operations; needs a C++ compiler")
    parser.add_argument("--out", type=pathlib.Path, help="make a model of the state, here")
    parser.add_argument("--decay", type=int, help="in so many steps")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    Fusion.on = args.compile
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    asked_to_stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: asked_to_stop.append(got))
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    model = restore(load_file(args.start / "model.safetensors")).train() if args.start else Model()
    run = Run(
        tokenizer,
        args.seed,
        model.to(args.device),
        Rates(peak=args.peak),
        batch=args.batch,
        loaders=args.loaders,
        dtype=DTYPES.get(args.dtype),
    )
    if args.start:
        made = json.loads((args.start / "training.json").read_text())
        run.before = dict(steps=made["steps"], tokens=made["tokens"])
        run.mix.wrong.update(wrong_shares(made["by_kind"]))
    run.mix.more = dict(args.more)
    file = args.state
    if args.out:
        file = args.state.with_name(args.state.name + ".decay")
        begin_decay(run, args.state, file, args.decay)
    elif file.exists():
        run.restore(file)
    until = args.steps if run.decay is None else sum(run.decay)
    if train(run, until, file, args.minutes, lambda: bool(asked_to_stop)) and args.out:
        finish(run, tokenizer, args.out)
        file.unlink()


if __name__ == "__main__":
    main()
