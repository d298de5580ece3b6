"""Files and batches in a folder, which several ingress replicas may share: each change is one rename or one append, and
who runs a batch holds a lock that ends with its process.

`files/ID` is a file's content and `files/ID.json` what is said of it, written last; `batches/ID/` has batch.json,
written by the lock's holder alone once it is there, output.jsonl and errors.jsonl while it runs, and `cancel` once that
was asked for. Everything here blocks, if only for moments."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from isotherm.cluster.api.batches import stored
from isotherm.cluster.api.batches.disk import found_full, waits_for
from isotherm.cluster.api.batches.rows import Fault
from isotherm.cluster.api.batches.space import Space
from isotherm.cluster.api.batches.state import FINAL, shown
from isotherm.cluster.api.batches.stored import owner_of
from isotherm.cluster.api.errors import NOT_AGAIN, ReplyError
from isotherm.cluster.jsontypes import JSON

log = logging.getLogger(__name__)
_FILE_ID, _BATCH_ID = re.compile(r"file-[0-9a-f]{32}"), re.compile(r"batch_[0-9a-f]{32}")
FOLDERS = "files", "batches", "uploads"  # that are made in the one that is given
_STALE_UPLOAD = 3600.0  # seconds after which an upload that was left lying is nobody's


class Store:
    """`max_bytes`: all files and outputs together; `keep_seconds`: from a file's creation to its end, where its client
    does not say, and from a batch's end until it is forgotten. Raises OSError where nothing can be kept there."""

    def __init__(self, folder: Path, max_bytes: int, keep_seconds: int, clock: Callable[[], float] = time.time) -> None:
        self._files, self._batches, self._uploads = (folder / name for name in FOLDERS)
        self._keep, self.clock = keep_seconds, clock
        self.space = Space(folder, max_bytes)
        self._ended: set[str] = set()  # batches that were seen to be final: they stay so
        self._waiting: dict[str, Fault] = {}  # why batches that this process runs do not get on
        for path in (self._files, self._batches, self._uploads):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):  # another user's, or on a file system to be read alone
                raise PermissionError(errno.EACCES, "this user may not write there", str(path))

    # --- what has expired ---------------------------------------------------------------------------

    def sweep(self) -> None:
        """Delete what has expired, and what was left lying."""
        now = self.clock()
        for path in self._uploads.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if now - path.stat().st_mtime > _STALE_UPLOAD:
                    path.unlink()
        in_use = {batch["input_file_id"] for batch in self.batches() if batch["status"] not in FINAL}
        for file in self.files():
            if file["expires_at"] <= now and file["id"] not in in_use:
                self._remove_file(file["id"])
        for batch in self.batches():
            if batch["status"] in FINAL and _ended_at(batch) + self._keep <= now:
                shutil.rmtree(self._batches / batch["id"], ignore_errors=True)
        self._sweep_unreadable()

    def _sweep_unreadable(self) -> None:
        """Delete what nobody can ask for any more, as a power cut may leave it."""
        lying = [*self._files.iterdir(), *self._batches.glob("batch_*")]
        known = {found["id"] for found in (*self.files(), *self.batches())}
        for path in lying:
            with contextlib.suppress(FileNotFoundError):
                if path.name.removesuffix(".json") in known or self.clock() - path.stat().st_ctime <= self._keep:
                    continue
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    # --- files --------------------------------------------------------------------------------------

    def new_upload(self) -> Path:
        """Where a file may be written before it is one."""
        return self._uploads / uuid.uuid4().hex

    def add_file(
        self,
        path: Path,
        name: str,
        purpose: str,
        keep: int | None = None,
        file_id: str | None = None,
        owner: str = "",
    ) -> JSON:
        """Make a file of what lies at `path`, which is moved. Done twice with one `file_id` it is done once. It belongs
        to the key named `owner`."""
        is_new, file_id = file_id is None, file_id or f"file-{uuid.uuid4().hex}"
        if path.exists():
            stored.to_disk(path)
            os.replace(path, self._files / file_id)
        now = int(self.clock())
        file = {
            "id": file_id,
            "object": "file",
            "bytes": (self._files / file_id).stat().st_size,
            "created_at": now,
            "expires_at": now + (self._keep if keep is None else keep),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
            "status_details": None,
        }
        try:
            stored.write(self._files / f"{file_id}.json", {**file, "owner": owner})
        except OSError:
            if is_new:  # nobody comes back to it
                (self._files / file_id).unlink(missing_ok=True)
            raise
        return file

    def file(self, file_id: str, owner: str | None = None, param: str = "file_id") -> JSON:
        """A file as clients see it; with an `owner`, of theirs alone. Raises ReplyError 404 about `param`, the field
        that its id was given in."""
        found = stored.read(self._files / f"{file_id}.json") if _FILE_ID.fullmatch(file_id) else None
        if found is None or found["expires_at"] <= self.clock() or not _belongs(found, owner):
            raise _unknown("file", file_id, param)
        return _without_owner(found)

    def files(self, owner: str | None = None) -> list[JSON]:
        """All, or an owner's, the newest first."""
        found = _newest(stored.read(path) for path in self._files.glob("*.json"))
        return [_without_owner(file) for file in found if _belongs(file, owner)]

    def content(self, file_id: str, owner: str | None = None) -> Path:
        """Where a file's content lies. Raises ReplyError 404."""
        self.file(file_id, owner)
        return self._files / file_id

    def input(self, batch: JSON) -> Path:
        """Where the content of a batch's input lies, which is kept as long as the batch goes on."""
        return self._files / str(batch["input_file_id"])

    def delete_file(self, file_id: str, owner: str | None = None) -> None:
        """Raises ReplyError 404, and 409 where a batch still needs it."""
        self.file(file_id, owner)
        for batch in self.batches():
            if batch["input_file_id"] == file_id and batch["status"] not in FINAL:
                message = f"file_id: batch {batch['id']} still reads {file_id}; cancel it first"
                raise ReplyError(message, status=409, param="file_id", headers=NOT_AGAIN)
        self._remove_file(file_id)

    def _remove_file(self, file_id: str) -> None:
        (self._files / f"{file_id}.json").unlink(missing_ok=True)
        (self._files / file_id).unlink(missing_ok=True)

    # --- batches ------------------------------------------------------------------------------------

    def add_batch(self, batch: JSON) -> None:
        folder = self._batches / batch["id"]
        folder.mkdir(mode=0o700)
        try:
            stored.write(folder / "batch.json", batch)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def stored(self, batch_id: str) -> JSON:
        """A batch as who runs it has written it. Raises ReplyError 404."""
        found = stored.read(self._batches / batch_id / "batch.json") if _BATCH_ID.fullmatch(batch_id) else None
        if found is None:
            raise _unknown("batch", batch_id, "batch_id")
        return found

    def batch(self, batch_id: str, owner: str | None = None) -> JSON:
        """A batch as a client sees it; with an `owner`, of theirs alone. Raises ReplyError 404."""
        if not _belongs(found := self.stored(batch_id), owner):
            raise _unknown("batch", batch_id, "batch_id")
        return self._shown(found, found_full(self._batches))

    def batches(self, owner: str | None = None) -> list[JSON]:
        """All, or an owner's, as clients see them, the newest first."""
        found = _newest(stored.read(path) for path in self._batches.glob("*/batch.json"))
        full = found_full(self._batches)
        return [self._shown(batch, full) for batch in found if _belongs(batch, owner)]

    def _shown(self, batch: JSON, full: Fault | None) -> JSON:
        return shown(batch, self.cancelling_at(batch["id"]), self._waiting.get(batch["id"], full))

    def unfinished(self) -> list[JSON]:
        """Those that are not final, the oldest first. Costs little, however many are."""
        there = {path.name for path in self._batches.iterdir()}
        self._ended &= there
        found = [stored.read(self._batches / name / "batch.json") for name in there - self._ended]
        self._ended |= {batch["id"] for batch in found if batch is not None and batch["status"] in FINAL}
        for name in self._waiting.keys() - (there - self._ended):
            self.waits_no_more(name)
        return [batch for batch in reversed(_newest(iter(found))) if batch["id"] not in self._ended]

    def save(self, batch: JSON) -> None:
        """For the lock's holder alone."""
        stored.write(self._batches / batch["id"] / "batch.json", batch)
        self.waits_no_more(batch["id"])

    def waits(self, batch_id: str, error: OSError) -> None:
        """A batch that is run here does not get on, which its client is told from now on."""
        self._waiting[batch_id] = waits_for(error)

    def waiting(self, batches: Iterable[JSON]) -> dict[str, Fault]:
        """Which of the batches do not get on for want of storage, by id, and why."""
        full = found_full(self._batches)
        found = {batch["id"]: self._waiting.get(batch["id"], full) for batch in batches}
        return {batch_id: fault for batch_id, fault in found.items() if fault is not None}

    def waits_no_more(self, batch_id: str) -> None:
        self._waiting.pop(batch_id, None)

    def cancel(self, batch_id: str) -> None:
        (self._batches / batch_id / "cancel").touch()

    def cancelling_at(self, batch_id: str) -> float | None:
        try:
            return (self._batches / batch_id / "cancel").stat().st_mtime
        except FileNotFoundError:
            return None

    def over(self, batch: JSON) -> str | None:
        """The status that a batch which is not done has to end with now; None where it goes on."""
        if self.cancelling_at(batch["id"]) is not None:
            return "cancelled"
        return "expired" if self.clock() >= batch["expires_at"] else None

    @contextlib.contextmanager
    def lock(self, batch_id: str) -> Iterator[bool]:
        """Whether this is the one place where the batch may be run now."""
        try:
            file = os.open(self._batches / batch_id / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # swept meanwhile
            yield False
            return
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(file)

    def lines_of(self, batch_id: str, name: str, take: Callable[[JSON], object]) -> BinaryIO:
        """`output.jsonl` or `errors.jsonl` of a batch, to append to; `take` is given each line that it has. One that
        cannot be read is cut out: its row is asked again."""
        path = self._batches / batch_id / name
        torn: set[int] = set()  # where they begin
        end = 0
        with open(path, "a+b") as written:
            written.seek(0)
            for line in written:
                if not line.endswith(b"\n"):
                    written.truncate(end)
                    break
                if (said := stored.parsed(line)) is None:
                    torn.add(end)
                else:
                    take(said)
                end += len(line)
        if torn:
            log.error("%s had %d lines that cannot be read; their rows are asked again", path, len(torn))
            _cut_out(path, torn)
        return open(path, "ab", buffering=0)

    def publish(self, batch: JSON, name: str, file_id: str) -> str | None:
        """Make a file of what the batch has written → its id; None where that is nothing."""
        path = self._batches / batch["id"] / name
        if path.exists() and path.stat().st_size == 0:
            path.unlink()
        if not path.exists() and not (self._files / file_id).exists():
            return None
        keep = batch["output_expires_after"]
        self.add_file(path, f"{batch['id']}_{name}", "batch_output", keep, file_id, owner_of(batch))
        return file_id


def _cut_out(path: Path, torn: set[int]) -> None:
    """Leave out the lines that begin there."""
    part = path.with_name(f".{path.name}.part")
    begin = 0
    try:
        with open(path, "rb") as written, open(part, "wb") as whole:
            for line in written:
                if begin not in torn:
                    whole.write(line)
                begin += len(line)
        stored.to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _belongs(found: JSON, owner: str | None) -> bool:
    return owner is None or owner_of(found) == owner


def _without_owner(file: JSON) -> JSON:
    return {name: value for name, value in file.items() if name != "owner"}


def _newest(found: Iterator[JSON | None]) -> list[JSON]:
    there = [value for value in found if value is not None]
    return sorted(there, key=lambda value: (-value["created_at"], value["id"]))


def _ended_at(batch: JSON) -> float:
    """Of a batch that is final."""
    return float(batch.get(f"{batch['status']}_at") or batch["created_at"])


def _unknown(what: str, given: str, param: str) -> ReplyError:
    return ReplyError(f"{param}: there is no {what} {given[:100]!r}", status=404, param=param, code="not_found")
