"""Speculation for an engine, by its kind."""

from __future__ import annotations

from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.mtp_drafter import MtpDrafter
from isotherm.actors.models.local_experts import LocalExperts
from isotherm.cluster.engine.draft_lengths import DraftLengths
from isotherm.cluster.engine.drafts import Drafter
from isotherm.cluster.engine.ngram import NgramDrafter
from isotherm.cluster.engine.speculation import Speculation


def speculation_of(
    kind: str, tokens: int, engine: Engine, experts: int, top_k: int, own: LocalExperts | None = None
) -> Speculation | None:
    """`kind`: mtp, for a model that was loaded with its layer; ngram; or off. `experts`, `top_k`: of a MoE layer.
    `own`: the experts of the layer that guesses, where they are not the engine's."""
    if kind == "off":
        return None
    model = engine.model
    if kind == "mtp":
        assert model.mtp is not None, "the model is loaded with the layer that drafts"
        drafter: Drafter = MtpDrafter(model.mtp, own or engine.experts, engine.scheduler.config)
    else:
        drafter = NgramDrafter()
    return Speculation(drafter, tokens, DraftLengths(experts, top_k, kind == "mtp"))
