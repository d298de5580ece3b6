"""Writes the checkpoint with random weights that the speed figures of docs/performance.md are of:
`python tests/bench/make_checkpoint.py OUT [--fp8]`.

1.9 B parameters in DeepSeek-V3's architecture, of which a token is computed with 0.42 B, the embedding table not
counted. Takes a few minutes and some 8 GB of memory. The tokenizer is that of the bundled model, whose ids are the
first of this vocabulary.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from deepseek_checkpoints import make_checkpoint

from isotherm.cluster.model.path import bundled_model

M: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 4,
}
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write(out: Path, fp8: bool, shape: dict[str, Any] = M) -> Path:
    make_checkpoint(out, shape, fp8=fp8)
    for name in TEXT_FILES:
        shutil.copy(bundled_model() / name, out / name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--fp8", action="store_true", help="projections as e4m3 with 128×128 block scales, as DeepSeek-V3's"
    )
    a = parser.parse_args()
    write(a.out, a.fp8)


if __name__ == "__main__":
    main()
