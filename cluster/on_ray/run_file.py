"""Remembers where on this machine `isotherm serve` runs, so that `isotherm status` and `isotherm stop` find it without
an address."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def _directory() -> Path:
    return Path(tempfile.gettempdir()) / f"isotherm-{os.getuid()}"


@contextlib.contextmanager
def run_file(address: str, dashboard: str | None = None) -> Iterator[None]:
    """Announce the Ray address of a local cluster, and its dashboard's (host:port), for as long as this process keeps
    it."""
    directory = _directory()
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f"{os.getpid()}.json"
    half = path.with_suffix(".new")
    half.write_text(json.dumps({"address": address, "dashboard": dashboard}))
    half.rename(path)  # a reader finds all of it or nothing
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()  # stays while another cluster uses it


def local_address(dashboard_port: int | None = None) -> str | None:
    """The Ray address of the cluster that was started last by this user and still runs; of the one whose dashboard has
    that port, where one is given. Files of dead processes are removed."""
    directory = _directory()
    # In a folder that all may write to, another user could have made it, to have us join his cluster.
    if not directory.is_dir() or directory.is_symlink() or directory.stat().st_uid != os.getuid():
        return None
    found: list[tuple[int, str]] = []
    for path in directory.glob("*.json"):
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # gone meanwhile, or not ours
            if _alive(int(path.stem)):
                run = json.loads(path.read_text())
                if dashboard_port is None or str(run["dashboard"]).endswith(f":{dashboard_port}"):
                    found.append((path.stat().st_mtime_ns, run["address"]))
            else:
                path.unlink(missing_ok=True)
    return max(found)[1] if found else None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
