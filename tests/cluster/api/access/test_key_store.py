"""Lookups of keys, and files of them that change meanwhile."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from pathlib import Path

import pytest
from api_keys import key_store, make_key, quick_check, quick_hash

from isotherm.cluster.api.access import key_store as module
from isotherm.cluster.api.access import keys_file
from isotherm.cluster.api.access.hashing import hashed, new_key, new_key_id
from isotherm.cluster.api.access.key_store import (
    ENVIRONMENT_ID,
    KeySource,
    KeyStore,
    environment_entry,
    key_source_as_json,
    parse_key_source,
    passing_key,
)  # fmt: skip
from isotherm.cluster.api.access.keys_file import KeyEntry, KeysFileError, write_keys
from isotherm.cluster.api.errors import ReplyError

pytestmark = pytest.mark.slow


def find(store: KeyStore, key: str) -> str | None:
    """The name of the key in force."""
    found = asyncio.run(store.find(key))
    return None if found is None else found.caller.name


def test_keys_of_a_file(tmp_path: Path):
    (ann, first), (bob, second) = make_key("ann"), make_key("bob", roles=["admin"])
    store = key_store(tmp_path / "k.json", [first, second])
    assert store.known(ann) is None  # it has to be checked once
    assert [find(store, key) for key in (ann, bob, ann)] == ["ann", "bob", "ann"]
    known, named = store.known(bob), store.named("bob")
    assert known is not None and named is known and known.caller.roles == {"admin", "observe"}
    for wrong in (new_key(first.id), new_key(new_key_id()), ann[:-1], ann + "x", first.id, "", "sk-none", "x" * 9999):
        assert find(store, wrong) is None and find(store, wrong) is None


def test_a_file_that_changes_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    (ann, first), (bob, second) = make_key("ann", requests_per_minute=5), make_key("bob")
    path = tmp_path / "k.json"
    store = key_store(path, [first])

    async def until(key: str, there: bool) -> None:
        while (await store.find(key) is not None) != there:
            await asyncio.sleep(0.01)

    async def go() -> None:
        store.begin()
        assert await store.find(ann) is not None and await store.find(bob) is None
        kept = store.known(ann)
        assert kept is not None and kept.allowance.request(1.0) is None
        write_keys(path, [first.model_copy(update={"requests_per_minute": 7}), second])
        await asyncio.wait_for(until(bob, True), 5)
        changed = store.known(ann)
        assert changed is not None and changed.caller.limits.requests_per_minute == 7
        assert changed.allowance is kept.allowance, "what was taken stays taken"
        write_keys(path, [second])
        await asyncio.wait_for(until(ann, False), 5)
        # The same id with another secret is another key.
        other, _ = make_key("ann")
        write_keys(path, [first.model_copy(update={"hash": quick_hash(other)}), second])
        await asyncio.sleep(0.05)
        assert await store.find(ann) is None
        await store.close()

    asyncio.run(go())


@pytest.mark.parametrize("text", ["", "{", '{"keys": 3}', None])
def test_a_broken_file_keeps_the_keys_before_it_and_the_log_says_why(
    tmp_path: Path, text: str | None, caplog: pytest.LogCaptureFixture
):
    (ann, first), (bob, second) = make_key("ann"), make_key("bob")
    path = tmp_path / "k.json"
    store = key_store(path, [first])
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with caplog.at_level(logging.ERROR):
        store.look()
        store.look()
    assert len(caplog.records) == 1 and "stay in force" in caplog.text and str(path) in caplog.text
    assert find(store, ann) == "ann"
    write_keys(path, [second])
    store.look()
    assert (find(store, ann), find(store, bob)) == (None, "bob")


def test_a_store_that_begins_with_a_broken_file_lets_nobody_in_until_it_is_whole(tmp_path: Path):
    (ann, first), path = make_key("ann"), tmp_path / "k.json"
    path.write_text("{")
    store = KeyStore(KeySource(path), check=quick_check)
    with pytest.raises(ReplyError, match="cannot be read") as error:
        find(store, ann)
    assert error.value.status == 503 and error.value.headers["retry-after"] == "1"
    write_keys(path, [first])
    store.look()
    assert find(store, ann) == "ann"


def test_the_log_and_errors_have_no_key(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    ann, first = make_key("ann")
    with caplog.at_level(logging.DEBUG):
        store = key_store(tmp_path / "k.json", [first])
        assert find(store, ann) == "ann" and find(store, wrong := new_key(first.id)) is None
        (tmp_path / "k.json").write_text(f'{{"keys": ["{ann}"]}}')
        store.look()
    assert caplog.records
    assert all(secret.rpartition("-")[2] not in caplog.text for secret in (ann, wrong))
    assert ann not in repr(vars(store)) and wrong not in repr(vars(store))


def test_one_key_of_the_environment():
    store = KeyStore(KeySource(given=(environment_entry("a-key-that-somebody-made-up"),)))
    assert find(store, "a-key-that-somebody-made-up") == "environment"
    assert find(store, "a-key-that-somebody-made-UP") is None and find(store, new_key(ENVIRONMENT_ID)) is None
    for bad in ("short", "x" * 300, "sixteen characters with spaces", "sixteen-chars-é-more"):
        with pytest.raises(KeysFileError, match="ISOTHERM_API_KEY: a key has 16 to 256") as error:
            environment_entry(bad)
        assert bad not in str(error.value)


def test_given_keys_stay_whatever_the_file_says(tmp_path: Path):
    own, given = passing_key("isotherm-serve")
    ann, first = make_key("ann")
    write_keys(tmp_path / "k.json", [first])
    source = parse_key_source(key_source_as_json(KeySource(tmp_path / "k.json", (given,))))
    assert source == KeySource(tmp_path / "k.json", (given,)) and own not in repr(key_source_as_json(source))
    store = KeyStore(source)
    write_keys(tmp_path / "k.json", [])
    store.look()
    assert (find(store, own), find(store, ann)) == ("isotherm-serve", None)
    assert parse_key_source(key_source_as_json(None)) is None
    assert find(KeyStore(KeySource(tmp_path / "missing.json", (given,))), own) == "isotherm-serve"


def test_many_keys_that_were_never_seen_are_checked_one_by_one_and_refused_when_they_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ann, first = make_key("ann")
    at_once = [0, 0]

    def slow(key: str, hash_: str) -> bool:
        at_once[0] += 1
        at_once[1] = max(at_once)
        time.sleep(0.002)
        at_once[0] -= 1
        return quick_check(key, hash_)

    monkeypatch.setattr(module, "_WAITING", 20)
    write_keys(tmp_path / "k.json", [first])
    store = KeyStore(KeySource(tmp_path / "k.json"), check=slow)

    async def go() -> list[object]:
        assert await store.find(ann) is not None
        flood = [store.find(new_key(new_key_id())) for _ in range(60)]
        return await asyncio.gather(*flood, store.find(ann), return_exceptions=True)

    *wrong, right = asyncio.run(go())
    assert at_once == [0, 1] and right is not None and not isinstance(right, Exception)
    refused = [one for one in wrong if isinstance(one, ReplyError)]
    assert wrong.count(None) == 20 and [one.status for one in refused] == [503] * 40


def test_a_key_that_was_checked_costs_microseconds(tmp_path: Path):
    ann, first = make_key("ann")
    store = key_store(tmp_path / "k.json", [first])
    assert find(store, ann) == "ann"
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(1000):
            store.known(ann)
        seconds.append((time.perf_counter() - begin) / 1000)
    assert min(seconds) < 50e-6


def test_a_thousand_keys_are_read_anew_under_load_without_a_failed_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The file changes all the time, also to something broken; keys that stay in it are always let in."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    made = [make_key(f"key-{i}", requests_per_minute=10**9) for i in range(1000)]
    path, entries = tmp_path / "k.json", [entry for _, entry in made]
    store = key_store(path, entries)
    stays, comes = made[:900], [entry for _, entry in made[900:]]
    asked, versions, deadline = 0, set(), time.monotonic() + 60

    def enough() -> bool:
        return asked >= 3000 and len(versions) >= 5

    async def load(seed: int) -> None:
        nonlocal asked
        rng = random.Random(seed)
        while not enough():
            assert time.monotonic() < deadline, (asked, versions)
            key, entry = rng.choice(stays)
            found = await store.find(key)
            assert found is not None and found.caller.name == entry.name
            assert found.allowance.request(time.monotonic()) is None
            versions.add(found.caller.limits.tokens_per_minute)
            asked += 1
            await asyncio.sleep(0)

    async def change() -> None:
        version = 0
        while not enough():
            version += 1
            if version % 5 == 0:
                await asyncio.to_thread(path.write_text, '{"keys": [')
            else:
                kept = [entry.model_copy(update={"tokens_per_minute": version}) for _, entry in stays]
                await asyncio.to_thread(write_keys, path, kept + comes[: version % 100])
            await asyncio.sleep(0.05)

    async def go() -> None:
        store.begin()
        await asyncio.gather(*(load(seed) for seed in range(8)), change())
        await store.close()

    asyncio.run(go())


def test_a_thousand_keys_hold_the_event_loop_for_milliseconds(tmp_path: Path):
    """While they are put in force; they are read in a thread. In time of the processor, which a busy machine does not
    make longer."""
    made = [make_key(f"key-{i}")[1] for i in range(1000)]
    store = key_store(tmp_path / "k.json", made)
    seconds = []
    for i in range(5):
        changed = [entry.model_copy(update={"streams": i + 1}) for entry in made]
        begin = time.thread_time()
        store._put_in_force(changed)
        seconds.append(time.thread_time() - begin)
    assert min(seconds) < 0.1
    named = store.named("key-7")
    assert named is not None and named.caller.limits.streams == 5


def test_the_time_that_a_wrong_key_takes_tells_nothing(tmp_path: Path):
    """An id that is there with a wrong secret, right ones but for the end or the beginning, an id that is not there, a
    text of no form: in turn, each seen for the first time. In time of the processor, and the least of several, for
    what a busy machine adds is always more; where these are apart by chance they come together with more of them, and
    where they are apart for a reason they do not."""
    key = new_key(key_id := new_key_id())
    write_keys(tmp_path / "k.json", [KeyEntry(id=key_id, name="ann", hash=hashed(key))])
    store = KeyStore(KeySource(tmp_path / "k.json"))
    rng = random.Random(7)

    def letters(count: int) -> str:
        return "".join(rng.choice("abcdefghijk") for _ in range(count))

    kinds = {
        "wrong secret": lambda: new_key(key_id),
        "wrong end": lambda: key[:-8] + letters(8),
        "wrong beginning": lambda: key[:13] + letters(8) + key[21:],
        "unknown id": lambda: new_key(new_key_id()),
        "no form": lambda: letters(len(key)),
    }
    least = dict.fromkeys(kinds, math.inf)

    async def go() -> None:
        for rounds in range(1, 61):
            for kind in rng.sample(list(kinds), len(kinds)):
                text = kinds[kind]()
                begin = time.process_time()
                assert await store.find(text) is None
                least[kind] = min(least[kind], time.process_time() - begin)
            if rounds >= 8 and max(least.values()) < 1.1 * min(least.values()):
                return

    asyncio.run(go())
    assert max(least.values()) < 1.1 * min(least.values()), least
    assert min(least.values()) > 0.005, "each is hashed"


def test_every_wrong_key_is_hashed_once(tmp_path: Path):
    """Whatever is wrong with it: what the time above comes from."""
    _, entry = make_key("ann")
    checked: list[str] = []

    def check(text: str, hash_: str) -> bool:
        checked.append(text)
        return quick_check(text, hash_)

    write_keys(tmp_path / "k.json", [entry])
    store = KeyStore(KeySource(tmp_path / "k.json"), check=check)
    wrong = [new_key(entry.id), new_key(new_key_id()), "no form", ""]
    assert [find(store, text) for text in wrong] == [None] * 4 and checked == wrong


def test_a_file_that_could_not_be_read_is_tried_again_though_it_has_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """`sudo isotherm keys revoke` made it root's own; once it was given back, the revoked key stayed valid for ever."""
    (ann, first), (bob, second) = make_key("ann"), make_key("bob")
    path = tmp_path / "k.json"
    store = key_store(path, [first])
    write_keys(path, [second])

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(keys_file, "open", refuse, raising=False)
        store.look()
        store.look()
    assert len(caplog.records) == 1 and "Permission denied" in caplog.text
    assert find(store, ann) == "ann"
    store.look()
    assert (find(store, ann), find(store, bob)) == (None, "bob")


def test_rights_that_change_are_a_change_of_the_file(tmp_path: Path):
    path = tmp_path / "k.json"
    write_keys(path, [])
    before = module._signature(path)
    path.chmod(0o640)
    assert module._signature(path) != before


def test_an_unreadable_file_is_no_reason_to_end(tmp_path: Path):
    """Rights that were taken away, where that means anything."""
    ann, first = make_key("ann")
    path = tmp_path / "k.json"
    store = key_store(path, [first])
    os.utime(path, (1, 1))
    path.chmod(0)
    store.look()
    assert find(store, ann) == "ann"
