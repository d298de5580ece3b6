"""How much of the folder of files and batches is whose, and how much more may come."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isotherm.cluster.api.batches import stored
from isotherm.cluster.api.errors import ReplyError

_SHARE = 4  # one key's files and batches may take this part, and beyond it half of what is free


class Space:
    """`max_bytes`: of all files and batches in the folder together."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._files, self._batches, self._uploads = folder / "files", folder / "batches", folder / "uploads"
        self._max_bytes = max_bytes
        self._owners: dict[str, str] = {}  # by the ids of files and batches, which never change hands
        self._held: Counter[str] = Counter()  # by owner
        self._growing, self._counting = threading.Lock(), threading.Lock()  # the second one for moments

    def share(self, owner: str) -> int:
        return self._max_bytes // _SHARE if owner else self._max_bytes

    def left(self, owner: str) -> int:
        """Bytes that may still come from this owner, beside those that are held; may be below 0."""
        return self._left(owner)[0]

    def _left(self, owner: str) -> tuple[int, str]:
        """And of how many."""
        used = self._used()
        of_all = self._max_bytes - used.total() - self._held.total(), f"{self._max_bytes} that this server keeps"
        if not owner:
            return of_all
        share, free = self.share(owner), of_all[0]
        beyond = max(share - used[owner] - self._held[owner], free // 2)
        return min(of_all, (beyond, f"{share} that one key may keep here, and half of what is free beyond"))

    def is_full_for(self, owner: str) -> bool:
        """Whether a batch of this owner has to end, for its output finds no room: there is none at all, and it has its
        share, or as much as each would have of those that keep something, if all had the same. So nobody's batch ends
        because of what another one keeps."""
        used = self._used()
        owners = [one for one in used if one is not None]
        fair = (self._max_bytes - used[None]) // max(1, len(owners))
        return used.total() >= self._max_bytes and used[owner] >= min(self.share(owner), fair)

    @contextlib.contextmanager
    def hold(self, owner: str) -> Iterator[Hold]:
        """Room for what is being written, until it lies there and counts by itself."""
        hold = Hold(self, owner)
        try:
            yield hold
        finally:
            self._hold(hold, 0)

    def grow(self, hold: Hold, size: int, wished: int, what: str, param: str | None) -> None:
        with self._growing:
            left, bound = self._left(hold.owner)
            left += hold.size
            if size > left:
                message = f"{what}: {size} bytes are more than the {max(0, left)} that are left of the {bound}"
                message += "; delete files that are not needed any more"
                raise ReplyError(message, status=413, param=param, code="storage_full")
            self._hold(hold, min(max(size, wished), left))

    def _hold(self, hold: Hold, size: int) -> None:
        with self._counting:
            self._held[hold.owner] += size - hold.size
            hold.size = size

    def _used(self) -> Counter[str | None]:
        """Bytes by owner, those whose owner is not known under None."""
        used: Counter[str | None] = Counter()
        owners: dict[str, str] = {}
        for name, size in _sizes(self._files):
            file_id = name.removesuffix(".json")
            used[self._owner(file_id, self._files / f"{file_id}.json", owners)] += size
        for folder in self._batches.iterdir():
            owner = self._owner(folder.name, folder / "batch.json", owners)
            for _, size in _sizes(folder):
                used[owner] += size
        used[None] += sum(size for _, size in _sizes(self._uploads))
        self._owners = owners
        return used

    def _owner(self, name: str, path: Path, owners: dict[str, str]) -> str | None:
        """Of the file or batch of which `path` says it; `owners` are those that are known to be there."""
        owner = owners.get(name, self._owners.get(name))
        if owner is None and (said := stored.read(path)) is not None:
            owner = stored.owner_of(said)
        if owner is not None:
            owners[name] = owner
        return owner


@dataclass
class Hold:
    """What one owner is about to write. Growing it blocks, if only for moments."""

    space: Space
    owner: str
    size: int = 0

    def grow(self, size: int, wished: int = 0, what: str = "file", param: str | None = "file") -> None:
        """Hold at least `size` bytes, and up to `wished` where there is room. Raises ReplyError 413 about `what` was
        sent in `param`."""
        self.space.grow(self, size, wished, what, param)


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """The names in a folder, and how many bytes each has."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                yield entry.name, entry.stat().st_size
