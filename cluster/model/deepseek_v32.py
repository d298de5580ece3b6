"""A `deepseek_v32` checkpoint (DeepSeek-V3.2): DeepSeek-V3 with an indexer in each layer, which chooses the positions
that a row attends to once there are more than `index_topk`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.model.config import Fields
from isotherm.cluster.model.deepseek_v3 import DeepseekV3Config
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.cluster.model.tensors import Part, TensorSpec


@dataclass(frozen=True, kw_only=True)
class DeepseekV32Config(DeepseekV3Config):
    """DeepSeek Sparse Attention (arXiv:2512.02556, §2). The cache holds a key of the indexer beside each latent."""

    label: ClassVar[str] = "DeepSeek-V3.2"

    index_topk: int
    index_n_heads: int
    index_head_dim: int

    @classmethod
    def read(cls, f: Fields) -> JSON:
        own = super().read(f)
        if own["q_lora_rank"] is None:
            raise f.fail("q_lora_rank", None, "an integer: the indexer's queries are made of the queries' latent")
        head_dim = f.integer("index_head_dim", 128)
        if head_dim < own["qk_rope_head_dim"]:
            raise f.fail("index_head_dim", head_dim, f"at least qk_rope_head_dim ({own['qk_rope_head_dim']})")
        return own | {
            "index_topk": f.integer("index_topk", 2048),
            "index_n_heads": f.integer("index_n_heads", 64),
            "index_head_dim": head_dim,
        }

    def cache_bytes(self, element: int, kept: KvCacheDtype) -> int:
        return super().cache_bytes(element, kept) + self.index_head_dim * element

    def _attention_tensors(self, p: str) -> Iterator[TensorSpec]:
        assert self.q_lora_rank is not None
        yield from super()._attention_tensors(p)
        queries, width = self.index_n_heads * self.index_head_dim, self.index_head_dim
        for name, shape in {
            "wq_b": (queries, self.q_lora_rank),
            "wk": (width, self.hidden_size),
            "weights_proj": (self.index_n_heads, self.hidden_size),
        }.items():
            yield TensorSpec(f"{p}.indexer.{name}.weight", shape, Part.ATTENTION, quantisable=True)
        for name in ("weight", "bias"):
            yield TensorSpec(f"{p}.indexer.k_norm.{name}", (width,), Part.ATTENTION)

    def describe(self) -> JSON:
        return super().describe() | {
            "sparse_attention": f"{self.index_topk} positions, by {self.index_n_heads} heads of {self.index_head_dim}"
        }
