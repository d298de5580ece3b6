"""A training run: all that it consists of, one step of it, and its state in a file, from which it goes on with the same
numbers. Knows nothing about how long it lasts."""

from __future__ import annotations

import operator
import os
import pathlib
from typing import Any

import torch
from batches import BATCH_TOKENS, guessed_weights, right_documents, weighted_loss
from loaders import Loaders, Streams, documents_of
from mix import Mix
from model import CONFIG, Model, Rounding
from optimisation import Muon, Rates
from tokenizers import Tokenizer
from torch import nn

MTP_WEIGHTS = 0.3, 0.2, 0.1  # of the MTP layer's passes: the first guess is tried most often
# Of a decay: its steps see the weights as FP8 will store them, and train all passes of the MTP layer. All other steps
# train the first alone, for later guesses are learned quickly.
LAST_PART = 0.4


def quick_dtype(device: torch.device, cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> torch.dtype:
    """bfloat16 on an accelerator and where the CPU has instructions for its products, as Linux tells it (avx512_bf16,
    amx_bf16, Arm's bf16); elsewhere float32, since torch emulates such products, ten and more times slower."""
    if device.type != "cpu":
        return torch.bfloat16
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return torch.bfloat16 if words & {"avx512_bf16", "amx_bf16", "bf16"} else torch.float32


class Run:
    """Model, optimisers, documents and counters. `decay` is the step that the rates' fall begins at, and its length,
    or None while they stay. `batch`: tokens a step. `loaders`: how many processes draw documents, 0: this one. `dtype`:
    what products are computed in, bfloat16 or float32; None: the quick one of the device."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seed: int,
        model: Model,
        rates: Rates | None = None,
        batch: int = BATCH_TOKENS,
        loaders: int = 0,
        dtype: torch.dtype | None = None,
    ):
        self.seed, self.model, self.rates = seed, model, rates or Rates()
        self.step, self.decay, self.tokens = 0, None, 0
        self.before = dict(steps=0, tokens=0)  # of the runs that made the weights that this one began with
        self.mix, self.batch, self.device = Mix(), batch, model.embed_tokens.weight.device
        self.documents = (
            Loaders(tokenizer, seed, self.mix, batch, loaders) if loaders else Streams(tokenizer, seed, self.mix, batch)
        )
        self.matrices = [
            p
            for name, p in model.named_parameters()
            if name.startswith("layers.") and p.ndim > 1 and ".gate.weight" not in name
        ]
        embedding = model.embed_tokens.weight
        known = {id(p) for p in (*self.matrices, embedding)}
        self.others = [p for p in model.parameters() if id(p) not in known]
        self.dtype = dtype or quick_dtype(self.device)
        self.muon = Muon(self.matrices, lr=self.rates.matrices, dtype=self.dtype)
        groups = [dict(params=[embedding]), dict(params=self.others)]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self.load = [torch.zeros(CONFIG["n_routed_experts"], device=self.device) for _ in model.moe()]

    def advance(self) -> tuple[float, float]:
        """One step; its loss, and that of the MTP layer's first pass."""
        share = self.rates.share(self.step, self.decay)
        peaks = (self.rates.matrices, self.rates.embedding, self.rates.others)
        for group, peak in zip((*self.muon.param_groups, *self.adam.param_groups), peaks, strict=True):
            group["lr"] = peak * share
        Rounding.on = self._in_last_part
        losses = self._learn()
        Rounding.on = False
        for moe, average in zip(self.model.moe(), self.load, strict=True):
            average.lerp_(moe.load, 0.1 if self.step else 1.0)
            moe.gate.e_score_correction_bias += 1e-3 * (average.mean() - average).sign()
        self.step += 1
        self.tokens += self.batch
        return losses

    @property
    def _in_last_part(self) -> bool:
        return self.decay is not None and self.step >= self.decay[0] + (1 - LAST_PART) * self.decay[1]

    def _learn(self) -> tuple[float, float]:
        number = self.step + 1
        batch = self.documents.batch(number)
        tokens, weights, documents = (t.to(self.device, non_blocking=True) for t in batch[:3])
        batch = batch._replace(tokens=tokens, weights=weights, documents=documents)
        with self.autocast():
            one_context = documents_of(number)[1] is not None
            passes = len(MTP_WEIGHTS) if self._in_last_part else 1
            logits, ahead = self.model(tokens, passes, one_context)
        main = weighted_loss(logits, batch.tokens, batch.weights, 1)
        guesses = [weighted_loss(one, tokens, guessed_weights(batch, n), 2) for n, one in enumerate(ahead, 1)]
        (main + sum(map(operator.mul, MTP_WEIGHTS, guesses))).backward()  # of as many as there are
        for kind, right in zip(batch.kinds, right_documents(logits.detach(), batch).tolist(), strict=True):
            self.mix.record(kind, right)
        nn.utils.clip_grad_norm_([self.model.embed_tokens.weight, *self.others], 1.0)
        for optimiser in (self.muon, self.adam):
            optimiser.step()
            optimiser.zero_grad()
        return main.item(), guesses[0].item()

    def autocast(self) -> torch.autocast:
        """What the model's products run under."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def state(self) -> dict[str, Any]:
        return dict(
            seed=self.seed,
            step=self.step,
            tokens=self.tokens,
            decay=self.decay,
            before=self.before,
            model=self.model.state_dict(),
            muon=self.muon.state_dict(),
            adam=self.adam.state_dict(),
            load=self.load,
            wrong=self.mix.wrong,
            documents=self.documents.state(),
        )

    def save(self, path: pathlib.Path) -> None:
        """Whole or not at all: whoever reads the file meets the state before or the one after."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".new")
        torch.save(self.state(), beside)
        os.replace(beside, path)

    def restore(self, path: pathlib.Path) -> None:
        state = torch.load(path, weights_only=True, map_location=self.device)
        self.seed, self.step, self.tokens = state["seed"], state["step"], state["tokens"]
        self.decay, self.before = state["decay"], state.get("before", self.before)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.load = state["load"]
        self.mix.wrong.update(state["wrong"])
        self.documents.restore(state["documents"])


def step_of(path: pathlib.Path) -> int:
    """The step that a saved state is at."""
    return torch.load(path, weights_only=True, map_location="cpu")["step"]
