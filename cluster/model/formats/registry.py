"""Every weight format that is known, and which of them a weight is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from isotherm.cluster.model.formats.base import WeightFormat
from isotherm.cluster.model.formats.compressed import PackQuantized
from isotherm.cluster.model.formats.fp8 import CompressedFp8Blocks, Fp8Blocks
from isotherm.cluster.model.formats.gptq import AutoRound, Gptq
from isotherm.cluster.model.formats.int8 import Int8Groups
from isotherm.cluster.model.formats.mxfp4 import Mxfp4, QuarkMxfp4
from isotherm.cluster.model.formats.plain import Plain

if TYPE_CHECKING:
    from isotherm.cluster.model.config import Fields

PLAIN = Plain()
# All but Plain, in the order in which they are tried.
FORMATS: list[type[WeightFormat]] = [
    CompressedFp8Blocks,
    Fp8Blocks,
    PackQuantized,
    Gptq,
    AutoRound,
    Mxfp4,
    QuarkMxfp4,
    Int8Groups,
]


def configured(q: Fields) -> WeightFormat:
    """The format that config.json's quantization_config names. Raises ModelConfigError for one that is not known."""
    known = {method: f for f in FORMATS for method in f.quant_methods}
    q.exactly("quant_method", tuple(known), None)
    return known[q.raw["quant_method"]].configured(q)


def format_of(weight: str, dtype_of: Callable[[str], str | None], config: WeightFormat | None) -> WeightFormat:
    """The format that `weight` is stored in, by the tensors that are there: what config.json says only adds the
    parameters. `dtype_of`: a tensor's dtype; None where it is not there, empty where it is and its dtype is unknown."""
    for candidate in candidates(config):
        dtypes = {role: dtype_of(candidate.tensor_name(weight, role)) for role in candidate.leaves}
        if candidate.stores({role: dtype for role, dtype in dtypes.items() if dtype is not None}):
            return candidate
    return PLAIN


def candidates(config: WeightFormat | None) -> list[WeightFormat]:
    """Formats that a weight of this checkpoint may be in, but for Plain."""
    others = [f() for f in FORMATS if not f.needs_config and not isinstance(config, f)]
    return [*([] if config is None else [config]), *others]


def foreign_tensors(weight: str, own: WeightFormat) -> list[str]:
    """Names of tensors that `weight` would have if it were in another format than its own."""
    names = {f.tensor_name(weight, role) for f in FORMATS for role in f.leaves} - {weight}
    return sorted(names - {own.tensor_name(weight, role) for role in own.leaves})


def weight_dtypes() -> tuple[str, ...]:
    """Dtypes that a tensor named "weight" may have in any format."""
    formats: list[type[WeightFormat]] = [Plain, *FORMATS]
    known = [f() for f in formats if not f.needs_config]
    named = [f.wants((1, 1))[role] for f in known for role, leaf in f.leaves.items() if leaf == "weight"]
    return tuple(dict.fromkeys(dtype for wanted in named for dtype in wanted.dtypes))
