"""The mean of two models' weights, one of which was trained on from the other: often better than both.

    python manifests/tiny/average.py A B OUT [SHARE]

SHARE is B's, a half where it is not given. Its figures are measured as train.py's are, on the held-out documents of B's
seed; steps and tokens are B's, which count A's.
"""

from __future__ import annotations

import json
import pathlib
import sys

import torch
from checkpoint import restore, write
from evaluation import report
from safetensors.torch import load_file
from tokenizers import Tokenizer

HERE = pathlib.Path(__file__).parent


@torch.no_grad()
def average(a: pathlib.Path, b: pathlib.Path, out: pathlib.Path, share: float = 0.5) -> None:
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    model, other = (restore(load_file(folder / "model.safetensors")) for folder in (a, b))
    for mine, its in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        mine.lerp_(its, share)
    write(out, model, tokenizer)
    last = json.loads((b / "training.json").read_text())
    made = report(restore(load_file(out / "model.safetensors")), tokenizer, last["seed"])
    head = dict(steps=last["steps"], seed=last["seed"], tokens=last["tokens"])
    (out / "training.json").write_text(json.dumps(head | made, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    average(*map(pathlib.Path, sys.argv[1:4]), *map(float, sys.argv[4:]))
