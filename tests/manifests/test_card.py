"""The bundled model's card says what its training measured."""

from __future__ import annotations

import json

from tiny_recipe import TINY, tiny_recipe


def test_the_cards_figures_are_those_of_training_json():
    with tiny_recipe() as module:
        card = module("card")
        written = (TINY / "README.md").read_text().split(card.BEGIN)[1].split(card.END)[0]
        assert written == card.figures(json.loads((TINY / "training.json").read_text())), (
            "run python manifests/tiny/card.py"
        )
