"""The keys in force: looked up for each request, and read anew when their file has changed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isotherm.cluster.api.access.allowance import Allowance, share
from isotherm.cluster.api.access.caller import Caller
from isotherm.cluster.api.access.hashing import hashed, id_of, matches, new_key, new_key_id
from isotherm.cluster.api.access.keys_file import KeyEntry, KeysFileError, KeysFileUnreadableError, read_keys
from isotherm.cluster.api.errors import ReplyError, unavailable
from isotherm.cluster.background import Background
from isotherm.cluster.errors import one_line
from isotherm.cluster.jsontypes import JSON

log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0  # from one look whether the file has changed to the next
LONGEST_KEY = 256  # characters
_WAITING = 64  # keys that were never seen before and wait to be checked; each takes a core for some 40 ms
_REMEMBERED = 4096  # wrong keys: clients try the same one again and again

Signature = tuple[int, int, int, int]  # of a file as it was read: change of its text, of its rights, size, inode


@dataclass(frozen=True)
class KeySource:
    """Where the keys are: a file, and those that were given when the server was started, which are always in force."""

    file: Path | None = None
    given: tuple[KeyEntry, ...] = ()


@dataclass(frozen=True)
class Key:
    """A key in force."""

    entry: KeyEntry
    caller: Caller
    allowance: Allowance


@dataclass(frozen=True)
class _Keys:
    """All that are in force."""

    by_id: Mapping[str, Key] = field(default_factory=dict)
    by_name: Mapping[str, Key] = field(default_factory=dict)


class KeyStore:
    """Of one process. Lookups are for its event loop alone."""

    def __init__(self, source: KeySource, replicas: int = 1, check: Callable[[str, str], bool] = matches) -> None:
        """`replicas` share out each key's limits. `check` is `hashing.matches`. Where the file cannot be read, no key
        but the given ones is in force until it can."""
        self._source, self._replicas, self._check = source, replicas, check
        self._keys = _Keys()
        self._signature: Signature | None = None  # of what was read last, and need not be read again
        self._readable = source.file is None  # or it was once
        self._complaint = ""  # what was logged last of a file that cannot be used
        # A key that was checked is known again by a digest, which nobody can make who lacks this process's own secret:
        # what is compared has nothing to do with the key's text, so its time tells nothing of it.
        self._secret = secrets.token_bytes(32)
        self._right: dict[bytes, tuple[str, str]] = {}  # digest → id and hash of the entry that it is the key of
        self._wrong: OrderedDict[bytes, None] = OrderedDict()
        self._nobody = hashed(new_key(new_key_id()))  # checked where there is no such id
        self._turn = asyncio.Semaphore(1)
        self._waiting = 0
        self._background = Background()
        self._begun = False
        self._put_in_force(())
        self.look()

    # --- the file -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Look after the file from now on, on the event loop that runs; once."""
        if not self._begun:
            self._begun = True
            self._background.keep("the keys' file", self._watch)

    async def close(self) -> None:
        await self._background.close()
        self._begun = False

    async def _watch(self) -> None:
        while self._source.file is not None:
            await asyncio.sleep(LOOK_SECONDS)
            entries = await asyncio.to_thread(self._read_changed)
            if entries is not None:
                self._put_in_force(entries)

    def look(self) -> None:
        """Read the file now, where it has changed. Blocks."""
        entries = self._read_changed()
        if entries is not None:
            self._put_in_force(entries)

    def _read_changed(self) -> Sequence[KeyEntry] | None:
        """What the file says now; None where all keys stay as they are, since there is nothing new in it, or nothing
        that can be used: one that is gone, or half written by an editor, shuts nobody out."""
        path = self._source.file
        if path is None:
            return None
        signature = _signature(path)  # of before it is read: what changes meanwhile is seen at the next look
        if signature is not None and signature == self._signature:
            self._complaint = ""
            return None
        try:
            entries = read_keys(path)
        except KeysFileUnreadableError as error:
            self._complain(error)  # and look again: it may be given to this user without any change of it
            return None
        except KeysFileError as error:
            self._complain(error)
            self._signature = signature
            return None
        self._signature, self._readable, self._complaint = signature, True, ""
        return entries

    def _complain(self, error: KeysFileError) -> None:
        """Once, until something else is wrong."""
        if (said := one_line(error)) != self._complaint:
            kept = "the keys before it stay in force" if self._readable else "no key of it is in force"
            log.error("%s; %s", said, kept)
            self._complaint = said

    def _put_in_force(self, entries: Sequence[KeyEntry]) -> None:
        before, by_id = self._keys.by_id, {}
        for entry in (*entries, *self._source.given):
            if (old := before.get(entry.id)) is not None and old.entry == entry:
                by_id[entry.id] = old
                continue
            caller = entry.caller()
            limits = share(caller.limits, self._replicas)
            if old is None:
                allowance = Allowance(limits)
            else:
                allowance = old.allowance
                allowance.change(limits)
            by_id[entry.id] = Key(entry, caller, allowance)
        self._keys = _Keys(by_id, {key.entry.name: key for key in by_id.values()})
        self._right = {digest: (id_, hash_) for digest, (id_, hash_) in self._right.items() if id_ in by_id}
        self._wrong.clear()
        log.info("%d API keys are in force", len(by_id))

    # --- lookups ------------------------------------------------------------------------------------

    def named(self, name: str) -> Key | None:
        """The key of that name that is in force."""
        return self._keys.by_name.get(name)

    def still(self, key: Key) -> Key | None:
        """What a key that was in force is now; None where it was revoked, or its text was changed."""
        now = self._keys.by_id.get(key.entry.id)
        return now if now is not None and now.entry.hash == key.entry.hash else None

    def known(self, key: str) -> Key | None:
        """The key with this text, where it was checked before and is still in force. Costs microseconds."""
        found = self._right.get(self._digest(key))
        if found is None:
            return None
        in_force = self._keys.by_id.get(found[0])
        return in_force if in_force is not None and in_force.entry.hash == found[1] else None

    async def find(self, key: str) -> Key | None:
        """The key with this text; None where there is none in force. A text that was never seen takes as long as one
        check, whether its id is known or not. Raises ReplyError 503 where too many such wait."""
        if (known := self.known(key)) is not None or len(key) > LONGEST_KEY:
            return known
        digest = self._digest(key)
        if digest in self._wrong:
            self._wrong.move_to_end(digest)
            return None
        if self._waiting >= _WAITING:
            raise _busy("too many keys that were not seen before are being checked")
        self._waiting += 1
        try:
            # One after another: whoever sends wrong keys gets a part of one core, and no more.
            async with self._turn:
                return self.known(key) or await self._checked(key, digest)
        finally:
            self._waiting -= 1

    async def _checked(self, key: str, digest: bytes) -> Key | None:
        keys = self._keys
        found = keys.by_id.get(id_of(key) or "") or self._free_text()
        hash_ = self._nobody if found is None else found.entry.hash
        right = await asyncio.to_thread(self._check, key, hash_)
        if found is not None and right:
            self._right[digest] = (found.entry.id, found.entry.hash)
            return self.known(key)  # the file may have changed meanwhile
        if not self._readable:
            raise _busy("the server's keys cannot be read")
        if keys is self._keys:
            self._wrong[digest] = None
            if len(self._wrong) > _REMEMBERED:
                self._wrong.popitem(last=False)
        return None

    def _free_text(self) -> Key | None:
        """The key whose text is not ours, and so has no id: that of the environment."""
        return self._keys.by_id.get(ENVIRONMENT_ID)

    def _digest(self, key: str) -> bytes:
        return hashlib.blake2b(key.encode(errors="replace"), digest_size=32, key=self._secret).digest()


def key_source_as_json(source: KeySource | None) -> JSON | None:
    if source is None:
        return None
    given = [entry.model_dump() for entry in source.given]
    return {"file": None if source.file is None else str(source.file), "given": given}


def parse_key_source(said: JSON | None) -> KeySource | None:
    """What `key_source_as_json` gave."""
    if said is None:
        return None
    given = tuple(KeyEntry.model_validate(entry) for entry in said["given"])
    return KeySource(None if said["file"] is None else Path(said["file"]), given)


ENVIRONMENT, ENVIRONMENT_ID = "ISOTHERM_API_KEY", "00000000"
SHORTEST = 16  # characters of a key that somebody has made up


def environment_entry(key: str) -> KeyEntry:
    """The one key of a laptop, which may do everything. Raises KeysFileError."""
    if not SHORTEST <= len(key) <= LONGEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise KeysFileError(
            f"{ENVIRONMENT}: a key has {SHORTEST} to {LONGEST_KEY} printable ASCII characters without spaces, "
            f"as `openssl rand -hex 24` makes them; this one has {len(key)}"
        )
    return KeyEntry(id=ENVIRONMENT_ID, name="environment", hash=hashed(key), roles=["use", "observe", "admin"])


def passing_key(name: str) -> tuple[str, KeyEntry]:
    """A key for as long as this process lives, with which a server asks itself for one token at a time."""
    key = new_key(key_id := new_key_id())
    return key, KeyEntry(id=key_id, name=name, hash=hashed(key), n=1, max_tokens=1)


def _signature(path: Path) -> Signature | None:
    """None where nothing can be known of it."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


def _busy(reason: str) -> ReplyError:
    return unavailable(f"{reason}; try again in a second")


def now() -> float:
    """On the clock of allowances."""
    return time.monotonic()
