"""The architecture of a `deepseek_v3` checkpoint, read from its config.json and checked once."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotherm.cluster.model.formats.base import WeightFormat
from isotherm.cluster.model.formats.registry import configured


class ModelConfigError(ValueError):
    """config.json cannot be served; the message names the file, the field, the value and what is allowed."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: plain, or YaRN (arXiv:2309.00071) as DeepSeek-V3 uses it."""

    theta: float
    yarn_factor: float | None = None  # None: plain
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    attention_factor: float | None = None

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.yarn_factor is None:
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _yarn_mscale(self.yarn_factor, self.mscale) / _yarn_mscale(self.yarn_factor, self.mscale_all_dim)
        return _yarn_mscale(self.yarn_factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        """What the softmax scale is multiplied by: mscale(mscale_all_dim)², DeepSeek-V3's modeling_deepseek.py."""
        if self.yarn_factor is None or not self.mscale_all_dim:
            return 1.0
        return _yarn_mscale(self.yarn_factor, self.mscale_all_dim) ** 2


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Field names are the checkpoint's own."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    first_k_dense_replace: int
    moe_layer_freq: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    num_nextn_predict_layers: int  # what config.json says; the files may lack them
    quantisation: WeightFormat | None  # what config.json says; how a tensor is stored stands in its header
    stored_dtype: str  # likewise
    eos_token_ids: tuple[int, ...]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Elements in the KV cache per token and layer: the latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return self.qk_head_dim**-0.5 * self.rope.softmax_factor

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` has routed experts. The MTP layers, from num_hidden_layers on, all do."""
        if layer >= self.num_hidden_layers:
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe(i))

    @staticmethod
    def load(path: Path) -> ModelConfig:
        """Read `path`/config.json. Raises ModelConfigError."""
        file = path / "config.json"
        try:
            raw = json.loads(file.read_text())
        except FileNotFoundError:
            raise ModelConfigError(
                f"{file}: not found; a model directory has config.json, tokenizer.json and *.safetensors"
            ) from None
        except OSError as error:
            raise ModelConfigError(f"{file}: cannot be read ({error})") from None
        except (ValueError, RecursionError) as error:
            raise ModelConfigError(f"{file}: not valid JSON ({error})") from None
        return parse(raw, file)


class Fields:
    """Typed access to config.json that says what is wrong and where. A default is for a field that is absent: where
    it stands as null, it would be None in the reference implementation too, which cannot compute with it.
    `null_is_absent`: for fields where it can."""

    def __init__(self, raw: dict[str, Any], where: str, null_is_absent: bool = False):
        self.raw, self.where, self.null_is_absent = raw, where, null_is_absent

    def value(self, name: str, default: Any) -> Any:
        found = self.raw.get(name, default)
        return default if found is None and self.null_is_absent else found

    def fail(self, name: str, found: Any, allowed: str) -> ModelConfigError:
        value = json.dumps(found, default=str)
        missing = "is missing" if found is None else f"is missing, which means {value}"
        stands = f"is {value}" if name in self.raw else missing
        return ModelConfigError(f"{self.where}: {name} {stands}; it must be {allowed}")

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.fail(name, value, f"an integer of at least {minimum}")
        return value

    def number(self, name: str, default: float | None = None, minimum: float = 0.0) -> float:
        value = self.value(name, default)
        # The upper limit keeps integers out that no float can hold.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= 1e300:
            raise self.fail(name, value, f"a number of at least {minimum:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, value, "true or false")
        return value

    def exactly(self, name: str, allowed: tuple[Any, ...], default: Any) -> None:
        value = self.value(name, default)
        if value not in allowed:
            raise self.fail(name, value, " or ".join(json.dumps(a) for a in allowed))


NOT_YET = {
    "kimi_k2": "Kimi K2 is not supported yet",
    "deepseek_v32": "DeepSeek-V3.2's sparse attention is not supported yet",
}


def parse(raw: dict[str, Any], file: Path | str = "config.json") -> ModelConfig:
    """Check a decoded config.json. Sizes must be there; every other field that is absent has the value that
    transformers' DeepseekV3Config and DeepSeek's own configuration class give it. Raises ModelConfigError."""
    if not isinstance(raw, dict):
        raise ModelConfigError(f"{file}: must hold a JSON object, found {type(raw).__name__}")
    f, lenient = Fields(raw, str(file)), Fields(raw, str(file), null_is_absent=True)
    if isinstance(kind := raw.get("model_type"), str) and kind in NOT_YET:
        raise ModelConfigError(f'{file}: model_type is "{kind}": {NOT_YET[kind]}; it must be "deepseek_v3"')
    f.exactly("model_type", ("deepseek_v3",), None)
    f.exactly("hidden_act", ("silu",), "silu")
    f.exactly("scoring_func", ("sigmoid",), "sigmoid")
    f.exactly("topk_method", ("noaux_tc",), "noaux_tc")
    f.exactly("rope_interleave", (True,), True)
    rope_dim = f.integer("qk_rope_head_dim")
    if rope_dim % 2:
        raise f.fail("qk_rope_head_dim", rope_dim, "even")
    max_position = f.integer("max_position_embeddings", 4096)
    return ModelConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("hidden_size"),
        intermediate_size=f.integer("intermediate_size"),
        num_hidden_layers=f.integer("num_hidden_layers"),
        num_attention_heads=f.integer("num_attention_heads"),
        q_lora_rank=None if f.value("q_lora_rank", 1536) is None else f.integer("q_lora_rank", 1536),
        kv_lora_rank=f.integer("kv_lora_rank"),
        qk_nope_head_dim=f.integer("qk_nope_head_dim"),
        qk_rope_head_dim=rope_dim,
        v_head_dim=f.integer("v_head_dim"),
        attention_bias=f.boolean("attention_bias", False),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        max_position_embeddings=max_position,
        tie_word_embeddings=f.boolean("tie_word_embeddings", False),
        rope=_parse_rope(raw, lenient, max_position),
        first_k_dense_replace=f.integer("first_k_dense_replace", 3, minimum=0),
        moe_layer_freq=f.integer("moe_layer_freq", 1),
        moe_intermediate_size=f.integer("moe_intermediate_size"),
        n_shared_experts=f.integer("n_shared_experts", 1, minimum=0),
        norm_topk_prob=f.boolean("norm_topk_prob", True),
        routed_scaling_factor=f.number("routed_scaling_factor", 2.5),
        num_nextn_predict_layers=lenient.integer("num_nextn_predict_layers", 1, minimum=0),
        quantisation=_parse_quantisation(raw, f),
        stored_dtype=str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16").removeprefix("torch."),
        eos_token_ids=token_ids({"eos_token_id": 1} | raw, "eos_token_id", f.where),
        **_parse_routing(f),
    )


def _parse_routing(f: Fields) -> dict[str, int]:
    """How many experts there are, in how many groups, and how many of each a token goes to."""
    experts, groups = f.integer("n_routed_experts"), f.integer("n_group", 8)
    if experts % groups:
        raise f.fail("n_group", groups, f"a divisor of n_routed_experts ({experts})")
    topk_group = f.integer("topk_group", 4)
    if topk_group > groups:
        raise f.fail("topk_group", topk_group, f"at most n_group ({groups})")
    top_k = f.integer("num_experts_per_tok")
    if top_k > experts // groups * topk_group:
        raise f.fail(
            "num_experts_per_tok", top_k, f"at most the experts in topk_group groups ({experts // groups * topk_group})"
        )
    return {"n_routed_experts": experts, "n_group": groups, "topk_group": topk_group, "num_experts_per_tok": top_k}


def token_ids(raw: dict[str, Any], name: str, where: str) -> tuple[int, ...]:
    """A field that is null, one id or a list of ids."""
    value = raw.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise ModelConfigError(f"{where}: {name} is {value!r}; it must be a token id or a list of token ids")
    return tuple(ids)


def _parse_quantisation(raw: dict[str, Any], f: Fields) -> WeightFormat | None:
    quantisation = raw.get("quantization_config")
    if quantisation is None:
        return None
    if not isinstance(quantisation, dict):
        raise f.fail("quantization_config", quantisation, "null or an object")
    return configured(Fields(quantisation, f"{f.where}: quantization_config"))


def _parse_rope(raw: dict[str, Any], f: Fields, max_position: int) -> RopeConfig:
    """`rope_parameters` (new) or `rope_theta` + `rope_scaling` (old)."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    scaling = raw.get(name) or {}
    if not isinstance(scaling, dict):
        raise f.fail(name, scaling, "null or an object")
    r = Fields(scaling, f"{f.where}: {name}", null_is_absent=True)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = r.number("rope_theta", f.number("rope_theta", 10000.0))
    if theta <= 1:
        raise f.fail("rope_theta", theta, "a number above 1")
    if kind == "default":
        return RopeConfig(theta)
    if kind != "yarn":
        raise r.fail("rope_type", kind, '"default" or "yarn"')
    return RopeConfig(
        theta=theta,
        yarn_factor=r.number("factor", minimum=1.0),
        original_max_position=r.integer("original_max_position_embeddings", max_position),
        beta_fast=r.number("beta_fast", 32.0),
        beta_slow=r.number("beta_slow", 1.0),
        mscale=r.number("mscale", 0.0),
        mscale_all_dim=r.number("mscale_all_dim", 0.0),
        truncate=r.boolean("truncate", True),
        attention_factor=None if scaling.get("attention_factor") is None else r.number("attention_factor"),
    )
