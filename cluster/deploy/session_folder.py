"""The folder of temporary files, in which `isotherm serve` has its Ray put the session: logs and sockets. Looked at
before anything starts, for Ray itself tries for a minute and then tells of its own processes. Imports no Ray."""

from __future__ import annotations

import os
import shutil
import tempfile

from isotherm.cluster.manifest import human_bytes
from isotherm.cluster.supervise.supervisor import ServeError

LEAST_BYTES = 64 << 20  # free: a start writes two MiB of logs with the smallest model, more with each worker and hour
_PROBE = b"\0" * (64 << 10)
# The longest of the session's sockets, as supervisor and Ray name it below the folder of temporary files; what stands
# for chance and the moment is as long in each.
_SOCKET = "isotherm-12345678/ray/session_2026-01-01_00-00-00_123456_{pid}/sockets/plasma_store"
_LONGEST_SOCKET = 107  # characters of a Unix socket's path


def session_trouble() -> str:
    """Why no session can be put there, in one line that names the folder; empty where it can."""
    # tempfile passes over one that is of no use, and takes the next.
    variable = next((name for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)), None)
    folder = tempfile.gettempdir() if variable is None else os.path.abspath(os.environ[variable])
    said = f"temporary files go to {folder}" if variable is None else f"{variable} is {folder}"
    otherwise = "set TMPDIR to another folder" if variable is None else f"set {variable} to another folder, or unset it"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(_PROBE)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{said}, where Ray cannot write its session ({error.strerror}); {otherwise}"
    if free < LEAST_BYTES:
        needs = f"{human_bytes(free)} free, and Ray's session needs {human_bytes(LEAST_BYTES)}"
        return f"{said}, which has {needs}; free some, or {otherwise}"
    if len(folder) > (most := _LONGEST_SOCKET - len("/" + _SOCKET.format(pid=os.getpid()))):
        return f"{said}, which has more than the {most} characters that the paths of Ray's sockets leave; {otherwise}"
    return ""


def check_session_folder() -> None:
    """Raises ServeError where no session can be put there."""
    if trouble := session_trouble():
        raise ServeError(trouble)
