"""One side of the comparison as a process of its own: loads a model once, then measures what it is told to on standard
input.

    python sides.py SIDE MODEL [PART=BITS …] [isa=ISA]

A line in: "decode 8 48" or "prefill 512"; a line out: tokens per second.

SIDE: isotherm, transformers, vllm. Each runs in the virtual environment that has it. PART=BITS: as `weights` of the
manifest, and ISA as `isa` there, for isotherm.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Protocol

PROMPT = 32


class Side(Protocol):
    def decode(self, streams: int, tokens: int) -> float: ...

    def prefill(self, prompt: int) -> float: ...


class Isotherm:
    def __init__(self, model: str, *choice: str):
        from isotherm.cluster.cli.bench_engine import EngineBench
        from isotherm.cluster.model.weight_choice import WeightChoice

        parts = dict(part.split("=") for part in choice)
        isa = parts.pop("isa", "auto")
        self._bench = EngineBench(
            Path(model),
            dtype="bfloat16",
            kernels="native",
            threads=None,
            most_streams=32,
            most_prompt=512,
            isa=isa,
            choice=WeightChoice(**parts),
        )
        self.decode, self.prefill = self._bench.decode, self._bench.prefill


class Transformers:
    def __init__(self, model: str):
        import torch
        from transformers import AutoConfig, DeepseekV3ForCausalLM

        self._torch = torch
        torch.set_num_threads(os.cpu_count() or 1)
        self._vocab = AutoConfig.from_pretrained(model).vocab_size
        self._model = DeepseekV3ForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        ).eval()

    def _ids(self, streams: int, length: int):
        return self._torch.randint(0, self._vocab, (streams, length))

    def _generate(self, streams: int, tokens: int) -> float:
        begin = time.perf_counter()
        with self._torch.inference_mode():
            self._model.generate(
                self._ids(streams, PROMPT), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False
            )
        return time.perf_counter() - begin

    def decode(self, streams: int, tokens: int) -> float:
        # The difference of two lengths leaves out the prompt.
        short = self._generate(streams, 2)
        return streams * (tokens - 2) / (self._generate(streams, tokens) - short)

    def prefill(self, prompt: int) -> float:
        begin = time.perf_counter()
        with self._torch.inference_mode():
            self._model(self._ids(1, prompt), logits_to_keep=1)
        return prompt / (time.perf_counter() - begin)


class Vllm:
    def __init__(self, model: str):
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(model, dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False, max_num_seqs=32)
        self._vocab = self._llm.llm_engine.model_config.get_vocab_size()

    def _run(self, streams: int, prompt: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [random.randrange(self._vocab) for _ in range(prompt)]} for _ in range(streams)]
        params = self._params(temperature=0, max_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        self._llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    def decode(self, streams: int, tokens: int) -> float:
        short = self._run(streams, PROMPT, 2)
        return streams * (tokens - 2) / (self._run(streams, PROMPT, tokens) - short)

    def prefill(self, prompt: int) -> float:
        return prompt / self._run(1, prompt, 1)


SIDES = {"isotherm": Isotherm, "transformers": Transformers, "vllm": Vllm}


def main() -> None:
    # Libraries print to standard output; the protocol keeps the real one for itself.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    side: Side = SIDES[sys.argv[1]](*sys.argv[2:])
    print("ready", file=answers)
    for line in sys.stdin:
        what, *numbers = line.split()
        value = side.decode(*map(int, numbers)) if what == "decode" else side.prefill(*map(int, numbers))
        print(value, file=answers)


if __name__ == "__main__":
    main()
