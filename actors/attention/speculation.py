"""Speculation for an engine, by its kind."""

from __future__ import annotations

from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.mtp_drafter import MtpDrafter
from isotherm.cluster.engine.draft_lengths import DraftLengths
from isotherm.cluster.engine.drafts import Drafter
from isotherm.cluster.engine.ngram import NgramDrafter
from isotherm.cluster.engine.speculation import Speculation
from isotherm.cluster.model.config import ModelConfig


def speculation_of(kind: str, tokens: int, engine: Engine, config: ModelConfig) -> Speculation | None:
    """`kind`: mtp, for a model that was loaded with its layer; ngram; or off."""
    if kind == "off":
        return None
    model = engine.model
    if kind == "mtp":
        assert model.mtp is not None, "the model is loaded with the layer that drafts"
        drafter: Drafter = MtpDrafter(model.mtp, model.cos, model.sin, engine.experts, engine.scheduler.config)
    else:
        drafter = NgramDrafter()
    top_k = config.num_experts_per_tok if config.moe_layers else 0
    return Speculation(drafter, tokens, DraftLengths(config.n_routed_experts if top_k else 0, top_k, kind == "mtp"))
