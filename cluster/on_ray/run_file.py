"""Remembers where on this machine `isotherm serve` runs, so that commands find it without an address or a URL."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from isotherm.cluster.errors import IsothermError


class SeveralClustersError(IsothermError):
    """More than one cluster could be meant."""


def _directory() -> Path:
    return Path(tempfile.gettempdir()) / f"isotherm-{os.getuid()}"


def _is_own(directory: Path) -> bool:
    """Whether it is there, and this user's alone. In a folder that all may write to, another user could have made it:
    to have us join his cluster, or to have us write where a link of his points."""
    with contextlib.suppress(OSError):
        found = os.lstat(directory)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return False


@contextlib.contextmanager
def run_file(address: str, dashboard: str | None, url: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Announce the Ray address of a local cluster, its dashboard's (host:port), and where its front door listens, for
    as long as this process keeps it. A cluster that cannot be announced serves all the same, and `warn` is told why."""
    directory = _directory()
    path = directory / f"{os.getpid()}.json"
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        if not _is_own(directory):
            raise PermissionError(f"{directory} is not a folder of this user's alone; whoever made it must remove it")
        _write(path, {"address": address, "dashboard": dashboard, "url": url})
    except OSError as error:
        warn(
            f"warning: {error}. `isotherm status` and `isotherm stop` find this cluster only by --address {address}, "
            f"other commands by --url {url}"
        )
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.rmdir()  # stays while another cluster uses it


def _write(path: Path, said: dict[str, str | None]) -> None:
    """A reader finds all of it or nothing."""
    half = path.with_suffix(".new")
    half.unlink(missing_ok=True)  # of a process that had this one's number
    descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(said, file)
    half.rename(path)


def local_address(dashboard_port: int | None = None) -> str | None:
    """The Ray address of this user's cluster that runs on this machine, of the one whose dashboard has that port, where
    one is given; None where there is none. Raises SeveralClustersError where it could be one of several: `isotherm
    stop` must not guess."""
    found: dict[str, str | None] = {}
    for run in _runs():
        with contextlib.suppress(KeyError, TypeError):  # not ours
            if dashboard_port is None or str(run["dashboard"]).endswith(f":{dashboard_port}"):
                found[run["address"]] = run["dashboard"]
    return _only(
        {at: f"{at} (dashboard http://{dashboard})" if dashboard else at for at, dashboard in found.items()},
        "--address or RAY_ADDRESS",
    )


def local_url() -> str | None:
    """Where the front door of this user's cluster listens that runs on this machine; None where there is none. Raises
    SeveralClustersError where it could be one of several."""
    found: dict[str, str] = {}
    for run in _runs():
        with contextlib.suppress(KeyError, TypeError):  # not ours, or of before runs said it
            found[run["url"]] = run["url"]
    return _only(found, "--url")


def _only(found: dict[str, str], option: str) -> str | None:
    """The one that there is, if any; each with how it is told of."""
    if len(found) > 1:
        raise SeveralClustersError(
            f"{len(found)} clusters of yours run on this machine, at {' and '.join(found.values())}; say which is "
            f"meant by {option}"
        )
    return next(iter(found), None)


def _runs() -> Iterator[Any]:
    """What each file of a process says that is alive. Files of others are removed."""
    directory = _directory()
    if not _is_own(directory):
        return
    for path in sorted(directory.glob("*.json")):
        with contextlib.suppress(FileNotFoundError, ValueError):  # gone meanwhile, or not ours
            if _alive(int(path.stem)):
                yield json.loads(path.read_text())
            else:
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
