"""The file of API keys: JSON with the hash, the roles and the limits of each, and never a key itself."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from isotherm.cluster.api.access.caller import Caller, KeyLimits, Role
from isotherm.cluster.api.access.hashing import KEY_ID, check_hash
from isotherm.cluster.errors import IsothermError

MAX_BYTES = 16 << 20  # some 40,000 keys
_COUNT = Field(None, ge=1, le=10**12)
_NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}"


class KeysFileError(IsothermError, ValueError):
    """The file cannot be used; the message names it, the field and what would be right."""


class KeysFileUnreadableError(KeysFileError):
    """It is not there, or may not be read by this user: nothing is known of what stands in it."""


def _check_name(name: str) -> str:
    if not re.fullmatch(_NAME, name):
        wanted = "1 to 63 letters, digits, '.', '_', '@' and '-', and begin with a letter or digit"
        raise ValueError(f"{name[:80]!r} must be {wanted}")
    return name


_Name = Annotated[str, AfterValidator(_check_name)]


class KeyEntry(BaseModel):
    """One key, as the file has it. What is None is not limited."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    id: str = Field(pattern=rf"^{KEY_ID}$")  # stands in the key's own text
    name: _Name  # whose files, batches and responses they are
    hash: Annotated[str, AfterValidator(check_hash)]
    created: str = Field("", max_length=40)
    roles: list[Role] = Field(["use"], min_length=1)
    requests_per_minute: int | None = _COUNT
    tokens_per_minute: int | None = _COUNT
    streams: int | None = _COUNT
    n: int | None = _COUNT
    max_tokens: int | None = _COUNT
    models: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1)
    weight: float = Field(1.0, gt=0, le=1000)
    tenant: _Name | None = None  # default: the name

    def caller(self) -> Caller:
        models = None if self.models is None else frozenset(self.models)
        limits = KeyLimits(
            self.requests_per_minute, self.tokens_per_minute, self.streams, self.n, self.max_tokens, models
        )
        # Who may change the cluster may look at it.
        roles = frozenset(self.roles) | ({"observe"} if "admin" in self.roles else set())
        tenant = self.name if self.tenant is None else self.tenant
        return Caller(self.name, roles, tenant, self.weight, self.priority, limits)


class _File(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    keys: list[KeyEntry] = Field(max_length=100_000)


def parse_keys(text: bytes, where: str) -> tuple[KeyEntry, ...]:
    """Raises KeysFileError naming the first field that is wrong."""
    try:
        entries = _File.model_validate_json(text).keys
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        words = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
        raise KeysFileError(f"{where}: {field + ': ' if field else ''}{words}") from None
    for what in ("id", "name"):
        seen: set[str] = set()
        for i, entry in enumerate(entries):
            if (value := getattr(entry, what)) in seen:
                raise KeysFileError(f"{where}: keys[{i}].{what} is {value!r}, which another key has; each has its own")
            seen.add(value)
    return tuple(entries)


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """Raises KeysFileError."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise KeysFileUnreadableError(f"{path}: cannot be read ({error.strerror})") from None
    if len(text) > MAX_BYTES:
        raise KeysFileError(f"{path}: must have at most {MAX_BYTES} bytes")
    return parse_keys(text, str(path))


def write_keys(path: Path, entries: Sequence[KeyEntry]) -> None:
    """In one step: who reads the file meanwhile has it as it was, or as it is then. A new one is for its owner alone;
    one that was there stays whose it was, and who may read it still may: a server of another user goes on to. Where
    the path is a link, the file behind it is written, which is the one that the server reads."""
    path = path.resolve()
    kept = [entry.model_dump(exclude_defaults=True) for entry in entries]
    text = json.dumps({"keys": kept}, indent=1, ensure_ascii=False) + "\n"
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            _keep_rights(path, descriptor)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise


def _keep_rights(path: Path, descriptor: int) -> None:
    """The new file gets the owner, the group and the readers of the one at `path`, as far as this user may give them.
    Where he may not, it stays his alone."""
    with contextlib.suppress(OSError):
        old = os.stat(path)
        os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, 0o600 | old.st_mode & 0o044)


@contextlib.contextmanager
def changing(path: Path) -> Iterator[None]:
    """For this time nobody else changes a file of that folder by this function: of two who add a key, both have added
    theirs."""
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def find(entries: Collection[KeyEntry], name_or_id: str) -> KeyEntry | None:
    """By name, else by id."""
    by_name: Any = {entry.name: entry for entry in entries}
    return by_name.get(name_or_id) or next((entry for entry in entries if entry.id == name_or_id), None)
