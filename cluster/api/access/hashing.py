"""The text of an API key: made, hashed by scrypt (RFC 7914), and checked."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import string

COST = 1 << 14  # of scrypt: 16 MiB and some 40 ms. One cost for all, or the time of a check would tell which key it was
_BLOCK, _PARALLEL, _SALT_BYTES = 8, 1, 16
_LETTERS = string.ascii_letters + string.digits
_ID_LETTERS = string.ascii_lowercase + string.digits
_SECRET_CHARS, _ID_CHARS = 43, 8  # 256 bits; enough ids for one file
KEY_ID = r"[a-z0-9]{8}"
_KEY = re.compile(rf"iso-({KEY_ID})-[A-Za-z0-9]{{{_SECRET_CHARS}}}")
_HASH = re.compile(r"scrypt:([0-9]{1,9}):([A-Za-z0-9+/=]{24}):([A-Za-z0-9+/=]{44})")


def new_key_id() -> str:
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_CHARS))


def new_key(key_id: str) -> str:
    """A key that was never given to anybody."""
    return f"iso-{key_id}-" + "".join(secrets.choice(_LETTERS) for _ in range(_SECRET_CHARS))


def id_of(key: str) -> str | None:
    """The id in a key's text; None where it is none of ours."""
    found = _KEY.fullmatch(key)
    return None if found is None else found[1]


def hashed(key: str) -> str:
    """What is kept of a key, from which nobody learns it."""
    salt = secrets.token_bytes(_SALT_BYTES)
    return f"scrypt:{COST}:{_text(salt)}:{_text(_scrypt(key, salt))}"


def check_hash(value: str) -> str:
    """Raises ValueError where it is none that `hashed` makes."""
    found = _HASH.fullmatch(value)
    if found is None or int(found[1]) != COST:
        raise ValueError(f"must be scrypt:{COST}:SALT:HASH, as `isotherm keys create` writes it")
    return value


def matches(key: str, hash_: str) -> bool:
    """Whether the hash is this key's. Takes the same time whatever the answer."""
    _, _, salt, digest = hash_.split(":")
    return hmac.compare_digest(_scrypt(key, base64.b64decode(salt)), base64.b64decode(digest))


def _scrypt(key: str, salt: bytes) -> bytes:
    return hashlib.scrypt(key.encode(), salt=salt, n=COST, r=_BLOCK, p=_PARALLEL, maxmem=1 << 26, dklen=32)


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()
