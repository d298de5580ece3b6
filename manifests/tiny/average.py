"""The mean of two models' weights, one of which was trained on from the other: often better than both.

    python manifests/tiny/average.py A B OUT

Its figures are measured as train.py's are, on the held-out documents of A's seed; steps and tokens are B's, which
count A's.
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
def average(a: pathlib.Path, b: pathlib.Path, out: pathlib.Path) -> None:
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    model, other = (restore(load_file(folder / "model.safetensors")) for folder in (a, b))
    for mine, its in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        mine.copy_((mine + its) / 2)
    write(out, model, tokenizer)
    first, last = (json.loads((folder / "training.json").read_text()) for folder in (a, b))
    made = report(restore(load_file(out / "model.safetensors")), tokenizer, first["seed"])
    head = dict(steps=last["steps"], seed=first["seed"], tokens=last["tokens"])
    (out / "training.json").write_text(json.dumps(head | made, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    average(*map(pathlib.Path, sys.argv[1:]))
