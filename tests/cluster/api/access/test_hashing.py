from __future__ import annotations

import re

import pytest

from isotherm.cluster.api.access.hashing import COST, check_hash, hashed, id_of, matches, new_key, new_key_id


def test_a_key_has_its_id_in_it_and_is_known_by_its_hash_alone():
    key = new_key(key_id := new_key_id())
    assert re.fullmatch(r"iso-[a-z0-9]{8}-[A-Za-z0-9]{43}", key) and id_of(key) == key_id
    first, second = hashed(key), hashed(key)
    assert first != second and key not in first and key.rpartition("-")[2] not in first
    assert matches(key, first) and matches(key, second)
    assert not matches(new_key(key_id), first) and not matches(key[:-1], first) and not matches("", first)


@pytest.mark.parametrize("text", ["", "iso-", "iso-abcdefgh-", "sk-1234567890", f"iso-ABCDEFGH-{'a' * 43}", "iso\n"])
def test_other_texts_have_no_id(text: str):
    assert id_of(text) is None


def test_ids_and_keys_are_never_the_same():
    assert len({new_key_id() for _ in range(500)}) == 500 and len({new_key("abcdefgh") for _ in range(500)}) == 500


def test_a_hash_of_another_cost_is_refused():
    """Else the time of a check would tell whose key it was."""
    good = hashed("some key")
    assert check_hash(good) == good
    for bad in (good.replace(str(COST), "1024"), good[:-1], "plain text", good.replace("scrypt", "md5")):
        with pytest.raises(ValueError, match=rf"must be scrypt:{COST}:SALT:HASH"):
            check_hash(bad)
