"""The model card's tables, of `training.json`: `python manifests/tiny/card.py` writes them into README.md."""

from __future__ import annotations

import json
import pathlib
from typing import Any

HERE = pathlib.Path(__file__).parent
BEGIN, END = "<!-- of training.json, by card.py -->\n", "<!-- until here -->\n"


def figures(training: dict[str, Any]) -> str:
    """The part of the card between BEGIN and END."""
    load = ", ".join(f"{layer} {value:.2f}" for layer, value in training["max_over_mean_load"].items())
    accepted = training["mtp_acceptance"]
    lines = [
        "",
        f"- {training['steps']:,} steps, {training['tokens'] / 1e6:.1f} million tokens; "
        f"{training['parameters'] / 1e6:.1f} million parameters",
        f"- loss, held out: {training['held_out_loss']:.2f}",
        f"- expert load, max / mean over 49,152 held-out tokens: {load} (the last one is the MTP layer)",
        "- MTP acceptance at the first position (greedy: its argmax for t+2 is the main model's): "
        f"{accepted['assistant_tokens']:.1%} of answer tokens, {accepted['all_tokens']:.1%} of all tokens",
        "- of the first to the fourth guess of a step, where those before it were the true tokens: "
        f"{', '.join(f'{share:.1%}' for share in accepted['by_guess'])} of answer tokens",
        "",
        "| kind | right | of it |",
        "|---|---|---|",
    ]
    for task, right in training["accuracy"].items():
        kinds = {kind.partition("/")[2]: n for kind, n in training["by_kind"].items() if kind.startswith(f"{task}/")}
        lines.append(
            f"| {task} | {right} | {', '.join(f'{kind} {n}' for kind, n in kinds.items())} |".replace("  ", " ")
        )
    lines += ["", "Greedy answers, the wrong ones among them:", "", "| asked | answered |", "|---|---|"]
    lines += [f"| {asked} | {_cell(answered)} |" for asked, answered in training["samples"].items()]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def main() -> None:
    card = HERE / "README.md"
    before, rest = card.read_text().split(BEGIN)
    after = rest.split(END)[1]
    card.write_text(before + BEGIN + figures(json.loads((HERE / "training.json").read_text())) + END + after)


if __name__ == "__main__":
    main()
