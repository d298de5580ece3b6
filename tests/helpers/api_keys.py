"""API keys for tests: files of them whose hashes cost nothing, and a front door that asks for them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from isotherm.cluster.api.access.hashing import COST, new_key, new_key_id
from isotherm.cluster.api.access.key_store import KeySource, KeyStore
from isotherm.cluster.api.access.keys_file import KeyEntry, write_keys


def quick_hash(key: str) -> str:
    """In the form of the real ones, at a thousandth of their cost."""
    digest = hashlib.sha256(key.encode()).digest()
    return f"scrypt:{COST}:{base64.b64encode(digest[:16]).decode()}:{base64.b64encode(digest).decode()}"


def quick_check(key: str, hash_: str) -> bool:
    return quick_hash(key) == hash_


def make_key(name: str, **fields: Any) -> tuple[str, KeyEntry]:
    """Its text, and what a file has of it."""
    key = new_key(key_id := new_key_id())
    return key, KeyEntry(id=key_id, name=name, hash=quick_hash(key), **fields)


def key_store(path: Path, entries: Iterable[KeyEntry], **options: Any) -> KeyStore:
    """Over a file of these."""
    write_keys(path, list(entries))
    return KeyStore(KeySource(path), check=quick_check, **options)
