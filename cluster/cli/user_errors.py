"""Whose error it is: the user's, who is told one line, or a bug, which keeps its traceback."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer
from rich.console import Console

from isotherm.cluster.cli.printable import printable
from isotherm.cluster.errors import IsothermError
from isotherm.kernels.errors import KernelsUnavailable

errors = Console(stderr=True, emoji=False)


def user_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Errors that a user can do something about become one message and exit status 1; anything else keeps its
    traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise  # a RuntimeError to Python, but it only says the exit status
        except Exception as error:
            if not _is_for_the_user(error):
                raise
            said = printable(f"isotherm: {error}", errors.is_terminal)  # a server's words may be in it
            errors.print(said, style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None

    return wrapped


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message is all that is needed: Isotherm's own error, the system's (a file, a port, a connection), a
    URL that is none, or kernels that this machine cannot run."""
    from httpx import InvalidURL

    return isinstance(error, IsothermError | OSError | InvalidURL | KernelsUnavailable)
