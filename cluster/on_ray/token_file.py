"""Ray's token, in a file that nobody else can read: whoever has it runs code as this user. Imports no Ray."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from isotherm.cluster.errors import IsothermError

ELSEWHERE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # where Ray looks first


class RayTokenError(IsothermError, RuntimeError):
    """There is no place for Ray's token; the message says how to give one."""


def keep_token() -> None:
    """Make the token that a Ray of our own will ask for, where there is none yet, and have its owner alone read it. Ray
    would make one that every user of the machine can read. Raises RayTokenError."""
    if any(os.environ.get(name) for name in ELSEWHERE):
        return
    path = Path(os.path.expanduser("~/.ray/auth_token"))
    try:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            _make(path)
        else:
            if mode & 0o077:
                path.chmod(mode & 0o700)
    except OSError as error:
        raise RayTokenError(
            f"Ray's token cannot be kept in {path} ({error.strerror}); set HOME to a folder of this user, or "
            "RAY_AUTH_TOKEN_PATH to a file with a secret that this user alone can read"
        ) from None


def _make(path: Path) -> None:
    """In one step: who reads it meanwhile finds all of it or nothing, and of two who make one the first one's stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, half = tempfile.mkstemp(dir=path.parent, prefix="auth_token.")  # for its owner alone
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(half, path)
    finally:
        os.unlink(half)
