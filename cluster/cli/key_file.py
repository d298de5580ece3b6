"""--key-file: the API key of a command, which is never an argument, where any user of the machine could read it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from isotherm.cluster.client.calls import API_KEY


def _take(path: Path | None) -> Path | None:
    """Where clients of this process look for it."""
    if path is not None:
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"{path}: cannot be read ({error})") from None
        if not key or any(c.isspace() for c in key):
            raise typer.BadParameter(f"{path}: must hold an API key and nothing else")
        os.environ[API_KEY] = key
    return path


KeyFileOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(metavar="FILE", callback=_take, help=f"file that holds the API key; default: {API_KEY}"),
]
