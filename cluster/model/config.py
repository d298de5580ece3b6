"""What the cluster knows of a model whatever its family, and typed access to config.json."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.model.formats.base import WeightFormat
from isotherm.cluster.model.formats.registry import configured
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.cluster.model.tensors import TensorSpec


class ModelConfigError(IsothermError, ValueError):
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


KEPT_WEIGHTS = 32 << 20  # of the experts of a layer that guesses, up to which a shard keeps its own


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """One architecture: its sizes, the tensors that a checkpoint of it holds, and how its config.json is read. A family
    is a subclass with the fields that it has beside these; its entry is in `registry.FAMILIES`. Field names are the
    checkpoint's own."""

    not_supported: ClassVar[tuple[str, ...]] = ()  # what of a checkpoint is not served, for `isotherm inspect`

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    quantisation: WeightFormat | None  # what config.json says; how a tensor is stored stands in its header
    stored_dtype: str  # likewise
    eos_token_ids: tuple[int, ...]
    drafting_layers: int = 0  # multi-token-prediction layers that are used: Checkpoint.with_mtp

    @classmethod
    @abstractmethod
    def read(cls, f: Fields) -> JSON:
        """The values of the fields of this class, checked. Raises ModelConfigError."""

    @abstractmethod
    def cache_bytes(self, element: int, kept: KvCacheDtype) -> int:
        """Bytes in the KV cache per token and layer. `element`: bytes of an activation."""

    @abstractmethod
    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` has routed experts."""

    @abstractmethod
    def tensors(self) -> Iterator[TensorSpec]:
        """Everything that the model without its multi-token-prediction layers needs, in layer order."""

    @abstractmethod
    def expert_projections(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Names of the weights of a routed expert: gate, up and down projection."""

    @abstractmethod
    def describe(self) -> JSON:
        """What `isotherm inspect` says of the architecture."""

    def mtp_layer(self, tensor: str) -> int | None:
        """The multi-token-prediction layer that the tensor of this name belongs to, if any."""
        return None

    def mtp_tensors(self, layer: int) -> Iterator[TensorSpec]:
        """What a multi-token-prediction layer adds to the model's parameters."""
        yield from ()

    def loaded_tensors(self) -> Iterator[TensorSpec]:
        """What is read where the model is served: its own tensors, and those of layers that draft."""
        yield from self.tensors()
        for layer in range(self.num_hidden_layers, self.cache_layers):
            yield from self.mtp_tensors(layer)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Those with routed experts, of the layers that draft too."""
        return tuple(i for i in range(self.cache_layers) if self.is_moe(i))

    @property
    def cache_layers(self) -> int:
        """Layers with a KV cache."""
        return self.num_hidden_layers + self.drafting_layers

    @property
    def kept_draft_layer(self) -> int | None:
        """The layer that guesses, where its routed experts are so few and small that each shard has them beside those
        that expert groups hold."""
        layer = self.num_hidden_layers
        weights = 3 * self.n_routed_experts * self.hidden_size * self.moe_intermediate_size
        return layer if layer in self.moe_layers and weights <= KEPT_WEIGHTS else None


class Fields:
    """Typed access to config.json that says what is wrong and where. A default is for a field that is absent: where
    it stands as null, it would be None in the reference implementation too, which cannot compute with it.
    `null_is_absent`: for fields where it can."""

    def __init__(self, raw: JSON, where: str, null_is_absent: bool = False):
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


def token_ids(raw: JSON, name: str, where: str) -> tuple[int, ...]:
    """A field that is null, one id or a list of ids."""
    value = raw.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise ModelConfigError(f"{where}: {name} is {value!r}; it must be a token id or a list of token ids")
    return tuple(ids)


def parse_quantisation(f: Fields) -> WeightFormat | None:
    """The weight format that config.json names; None: weights are plain."""
    quantisation = f.raw.get("quantization_config")
    if quantisation is None:
        return None
    if not isinstance(quantisation, dict):
        raise f.fail("quantization_config", quantisation, "null or an object")
    return configured(Fields(quantisation, f"{f.where}: quantization_config"))


def parse_rope(f: Fields, max_position: int) -> RopeConfig:
    """`rope_parameters` (new) or `rope_theta` + `rope_scaling` (old)."""
    name = "rope_scaling" if f.raw.get("rope_scaling") else "rope_parameters"
    scaling = f.raw.get(name) or {}
    if not isinstance(scaling, dict):
        raise f.fail(name, scaling, "null or an object")
    r = Fields(scaling, f"{f.where}: {name}", null_is_absent=True)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    for where in (f, r):  # qk_rope_head_dim says already how many dimensions are rotated
        where.exactly("partial_rotary_factor", (1,), 1)
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
