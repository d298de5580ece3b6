"""The first half of a layer's exchange, whose routing the test gives."""

from __future__ import annotations

from torch import Tensor

from isotherm.actors.attention.exchange import ExpertExchange


def dispatch(exchange: ExpertExchange, layer: int, x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor) -> None:
    exchange._dispatch(layer, x_TD, ids_Tk, weights_Tk, exchange._begin_layer(layer))
