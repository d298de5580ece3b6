"""--deadline of commands that change the cluster."""

from __future__ import annotations

from typing import Any

import typer

LONGEST = 86400.0  # seconds, as the front door takes them (cluster/messages/operations.py)


def deadline_option(what: str) -> Any:
    """`what`: what must be done by then."""
    return typer.Option(metavar="SECONDS", callback=_checked, help=f"seconds in which {what}; default 120")


def _checked(seconds: float | None) -> float | None:
    if seconds is not None and not 0 < seconds <= LONGEST:  # nan is neither
        raise typer.BadParameter(f"{seconds:g} must be more than 0 and at most {LONGEST:g}")
    return seconds
