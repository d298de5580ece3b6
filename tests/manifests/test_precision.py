"""On the bundled model, native bfloat16 log-probabilities are as close to the float32 ones as transformers' own
bfloat16 run is.

A trained model: random weights are chaotic in bfloat16, since one flipped expert changes everything after it. Here too
a flip decides the worst token, on either side by chance, so that tokens which one has moved are counted, and the worst
of a thousand are taken together; the mean, the median, the 99th and the 99.9th percentile are compared without a
margin.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_oracle import read_tensors
from safetensors.torch import save_file
from tiny_recipe import tiny_recipe
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from isotherm.actors.local import local_engine
from isotherm.actors.models.step_batch import build_batch
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.sequence import Chunk, Form, ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.ops import Kernels
from isotherm.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.slow

BLOCKS, BLOCK_SIZE = 16, 16
DRAWN = 240  # dialogues beside those below
WORST_MARGIN = 1.5  # of the worst token, and of the mean of the worst thousandth, some of which a flip has moved
MOVED = 0.2  # by so much or more a flipped expert moves a token, which happens to a few of ten thousand, to any of them

# Dialogues that manifests/tiny/data.py makes and keeps out of the training (`held_out`).
DIALOGUES = [
    ("What is 42 minus 5?", "42 - 5 = 37."),
    ("Do you have a name?",
     "I have no name of my own. I am Isotherm's tiny model, a very small language model of the DeepSeek-V3 family."),
    ("Name the capital of Thailand.", "The capital of Thailand is Bangkok."),
    ("Count from one to 28", ", ".join(map(str, range(1, 29))) + "."),
    ("I have a question. Add 64 and 43.", "64 + 43 = 107."),
    ("Can you tell me: List the months of the year",
     "January, February, March, April, May, June, July, August, September, October, November, December."),
    ("How many grams are 5 kilograms? Think step by step.",
     "<think>The question is: How many grams are 5 kilograms? Let me answer. 5 kilograms are 5000 grams.</think>"
     "5 kilograms are 5000 grams."),
    ("What's 98 + 13?", "<think>The question is: What's 98 + 13? I know this. 98 + 13 = 111.</think>98 + 13 = 111."),
    ("Which number is less: 70 or 91?",
     "<think>The question is: Which number is less: 70 or 91? Let me answer. 70 is smaller than 91.</think>"
     "70 is smaller than 91."),
    ("Think before you answer. Alice has 10 boxes with 3 pencils in each. How many pencils are there in all?",
     "<think>There are 10 boxes with 3 each. 10 × 3 = 30.</think>Alice has 30 pencils."),
    ("Hey, Which day is the fifth of the week?", "The fifth day of the week is Friday."),
    ("Answer in JSON: what is the capital of Bulgaria?", '{"country": "Bulgaria", "capital": "Sofia"}'),
    ("How do you say thank you in Japanese", 'In Japanese, thank you is "Arigato".'),
    ("What is the smallest of 67, 26, 27, 49?", "The smallest is 26."),
]  # fmt: skip

Document = tuple[list[int], int]  # token ids, and how many of them are the prompt


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Those above, and others that were kept out of the training."""
    tokenizer = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    with tiny_recipe() as recipe:
        drawn = recipe("evaluation").held_out_stream(tokenizer, 3).documents(2 * DRAWN)
    fitting = [made for doc, made in drawn if doc.exact and 20 < len(made.ids) < BLOCKS * BLOCK_SIZE]
    out = [(made.ids, made.weights.index(1.0)) for made in fitting[:DRAWN] if 1.0 in made.weights]
    for question, answer in DIALOGUES:
        prompt = tokenizer.encode(
            f"<｜begin▁of▁sentence｜><｜User｜>{question}<｜Assistant｜>", add_special_tokens=False
        ).ids
        out.append(
            (prompt + tokenizer.encode(f"{answer}<｜end▁of▁sentence｜>", add_special_tokens=False).ids, len(prompt))
        )
    return out


def of_next(logits_TV: Tensor, tokens: list[int]) -> Tensor:
    """Log-probability that each token but the first had."""
    return logits_TV.float().log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@torch.inference_mode()
def by_transformers(weights: dict[str, Tensor], folder: Path, dtype: torch.dtype, documents: list[Document]) -> Tensor:
    """From the given weights, as `from_pretrained` loads and runs them in `dtype`."""
    config = json.loads((bundled_model() / "config.json").read_text())
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype")} | {
        "num_nextn_predict_layers": 0
    }
    (folder / "config.json").write_text(json.dumps(plain))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return torch.cat([of_next(model.eval()(torch.tensor([tokens])).logits[0], tokens) for tokens, _ in documents])


def by_isotherm(path: Path, kernels: Kernels, documents: list[Document]) -> Tensor:
    """Prompts in prefill form, answers in decode form."""
    engine = local_engine(
        Checkpoint.open(path), kernels, SchedulerConfig(BLOCK_SIZE, BLOCKS, 512, 1, BLOCKS * BLOCK_SIZE)
    )
    out = []
    for tokens, prompt in documents:
        sequence = ScheduledSequence(
            GenerationRequest("", tuple(tokens), SamplingParams(1)), 0, tokens, blocks=list(range(BLOCKS))
        )
        rows = []
        for form, start, count in ((Form.PREFILL, 0, prompt), (Form.DECODE, prompt, len(tokens) - prompt)):
            batch = build_batch(
                [Chunk(sequence, start, count, form, sample=False)], BLOCK_SIZE, engine.model.cos, engine.model.sin
            )
            rows.append(engine.model.logits(engine.model.forward(batch, engine.cache, engine.experts)))
        out.append(of_next(torch.cat(rows), tokens))
    return torch.cat(out)


@pytest.mark.parametrize("stored", ["fp8", "bf16"])
def test_native_bfloat16_is_as_close_to_float32_as_transformers(stored: str, documents: list[Document], tmp_path: Path):
    """`fp8`: the model as it is bundled, which transformers widens. `bf16`: its weights rounded to bfloat16, the same
    for both sides."""
    weights = read_tensors(bundled_model())
    path = bundled_model()
    if stored == "bf16":
        weights = {name: w if name.endswith("correction_bias") else w.bfloat16().float() for name, w in weights.items()}
        path = tmp_path / "bf16"
        path.mkdir()
        config = json.loads((bundled_model() / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
        (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
        save_file(
            {name: w if name.endswith("correction_bias") else w.bfloat16() for name, w in weights.items()},
            path / "model.safetensors",
        )
    exact = by_transformers(weights, tmp_path, torch.float32, documents)
    assert len(exact) > 10_000
    # The reference of the comparison is sound: our definition of correct says the same in float32.
    torch.testing.assert_close(by_isotherm(path, ReferenceKernels(torch.float32), documents), exact, rtol=0, atol=1e-4)

    ours = (by_isotherm(path, NativeKernels(torch.bfloat16), documents) - exact).abs()
    theirs = (by_transformers(weights, tmp_path, torch.bfloat16, documents) - exact).abs()
    print(f"\n|Δ log p| over {len(exact)} tokens, weights {stored}:")
    for name, error in (("isotherm native", ours), ("transformers", theirs)):
        print(
            f"  {name}: mean {error.mean():.5f}, median {error.median():.5f}, 99th percentile "
            f"{error.quantile(0.99):.4f}, worst {error.max():.3f}"
        )
    assert ours.mean() <= theirs.mean()
    assert ours.median() <= theirs.median()
    assert ours.quantile(0.99) <= theirs.quantile(0.99)
    assert (ours > MOVED).sum() <= 2 * (theirs > MOVED).sum() + 2
    assert ours.quantile(0.999) <= theirs.quantile(0.999)
    worst = len(exact) // 1000
    assert ours.topk(worst).values.mean() <= WORST_MARGIN * theirs.topk(worst).values.mean()
    assert ours.max() <= WORST_MARGIN * theirs.max()
