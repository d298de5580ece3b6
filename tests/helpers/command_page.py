"""docs/commands.md from the commands themselves: `python tests/helpers/command_page.py` writes it anew."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from isotherm.cluster.cli.main import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "commands.md"
HEAD = """# The commands and their options

As `isotherm COMMAND --help` has them: `python tests/helpers/command_page.py` writes this page. What they are for is in
[operations](operations.md), [access](access.md) (`keys`), [performance](performance.md) (`bench`) and
[quantisation](quantisation.md) (`convert`, `inspect`).
"""


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Each command that can be called, by its whole name."""
    if hasattr(command, "commands"):
        for word, inner in command.commands.items():
            yield from commands(inner, f"{name} {word}")
    else:
        yield name, command


def _row(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    elif parameter.metavar is not None:
        names += f" `{parameter.metavar}`"
    default = "" if parameter.default is None or parameter.default is False else f"`{parameter.default}`"
    return "| " + " | ".join(words.replace("|", "\\|") for words in (names, parameter.help or "", default)) + " |"


def page() -> str:
    said = [HEAD]
    for name, command in commands(typer.main.get_command(app), "isotherm"):
        said.append(f"## `{name}`\n\n{' '.join(command.help.split())}\n")
        if rows := [_row(parameter) for parameter in command.params if "--help" not in parameter.opts]:
            said.append("| option | what it is | default |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return re.sub(r" +\|", " |", "\n".join(said))


if __name__ == "__main__":
    PAGE.write_text(page())
