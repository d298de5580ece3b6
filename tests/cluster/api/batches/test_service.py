"""The batches of one replica: whose turn it is, and what happens where running one fails."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from waiting import until

from isotherm.cluster.api.batches import disk, retries, runner, service
from isotherm.cluster.api.batches import store as store_module
from isotherm.cluster.api.batches.retries import Retries
from isotherm.cluster.api.batches.service import BatchLimits, BatchService
from isotherm.cluster.api.batches.state import FINAL, new_batch
from isotherm.cluster.api.batches.store import Store

URL = "/v1/completions"


@pytest.fixture
def store(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(service, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(runner, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)
    return Store(tmp_path, 1 << 20, 100_000, clock)


@pytest.fixture
def asked():
    return Counter()


@asynccontextmanager
async def serving(store, asked, refused=()):
    """Rows of the keys that are `refused` are told to come later."""

    async def answer(request):
        owner = request.scope["state"]["owner"]
        asked[owner] += 1
        return JSONResponse({}, 429 if owner in refused else 200)

    batches = BatchService(store, BatchLimits(concurrency=2), 100_000)
    batches.serve_with(Starlette(routes=[Route(URL, answer, methods=["POST"])]), lambda: 100)
    batches.begin()
    try:
        yield batches
    finally:
        await batches.close()


def batch_of(store, number, owner="", window="168h", rows=3):
    lines = [json.dumps({"custom_id": str(i), "method": "POST", "url": URL, "body": {}}) for i in range(rows)]
    path = store.new_upload()
    path.write_text("\n".join(lines))
    file = store.add_file(path, "in.jsonl", "batch", owner=owner)
    store.clock.now += 1
    batch = new_batch(f"batch_{number:032x}", URL, file["id"], window, None, None, store.clock(), owner)
    store.add_batch(batch)
    return batch["id"]


async def ended(store, batch_id, seconds=10.0):
    until = asyncio.get_running_loop().time() + seconds
    while (batch := store.batch(batch_id))["status"] not in FINAL:
        assert asyncio.get_running_loop().time() < until, batch
        await asyncio.sleep(0.01)
    return batch


def test_one_keys_batches_keep_nobody_elses_waiting_and_those_that_wait_end_in_time(store, clock, asked):
    async def go():
        for number in range(4):
            batch_of(store, number, "a")
        others, fifth, sixth = batch_of(store, 4, "b"), batch_of(store, 5, "a", "1h"), batch_of(store, 6, "a")
        async with serving(store, asked, refused=["a"]) as batches:
            assert (await ended(store, others))["status"] == "completed"
            assert store.batch(fifth)["status"] == store.batch(sixth)["status"] == "validating"
            store.cancel(sixth)
            batches.added()
            assert (await ended(store, sixth))["status"] == "cancelled"
            before = asked["a"]
            clock.now += 3600
            batch = await ended(store, fifth)
            assert batch["status"] == "expired" and batch["request_counts"]["failed"] == 3
            assert asked["a"] - before <= 4 * 2, "of the four that run; they come again after a second"
            assert [store.batch(f"batch_{number:032x}")["status"] for number in range(4)] == ["in_progress"] * 4

    asyncio.run(go())


def failing(monkeypatch, *errors):
    """Running a batch raises these, one after the other → how often it was run."""
    runs = []
    left = list(errors)
    real = runner.BatchRun.run

    async def run(self):
        runs.append(self)
        if left:
            raise left.pop(0).with_traceback(None)
        await real(self)

    monkeypatch.setattr(runner.BatchRun, "run", run)
    return runs


def test_a_batch_that_fails_for_another_reason_than_its_rows_is_tried_three_times(store, asked, monkeypatch):
    batch_id, runs = batch_of(store, 1), failing(monkeypatch, *[RuntimeError("broken")] * 9)

    async def go():
        async with serving(store, asked):
            return await ended(store, batch_id)

    batch = asyncio.run(go())
    assert batch["status"] == "failed" and len(runs) == 3
    assert batch["errors"]["data"][0]["message"].startswith("it stopped 3 times; the last time: RuntimeError: broken")


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(28, "No space left on device"), "storage_full"), (PermissionError(13, "no"), "storage_unavailable")],
)
def test_a_disk_is_waited_for_until_the_window_is_over(store, clock, asked, monkeypatch, error, code):
    monkeypatch.setattr(retries, "LONGEST_PAUSE", 0.01)
    batch_id = batch_of(store, 1)
    runs = failing(monkeypatch, *[error] * 12)

    async def go():
        async with serving(store, asked):
            first = await ended(store, batch_id)
            assert len(runs) > 12
            failing(monkeypatch, *[error] * 100)
            batch = batch_of(store, 3, window="1h")
            await asyncio.to_thread(until, lambda: store.batch(batch)["errors"])
            seen = store.batch(batch)
            assert (seen["status"], seen["errors"]["data"][0]["code"]) == ("validating", code)
            clock.now += 3600
            return first, await ended(store, batch)

    first, second = asyncio.run(go())
    assert (first["status"], first["errors"], second["status"]) == ("completed", None, "failed")


def test_it_tells_which_batches_wait_for_storage(store, asked, monkeypatch):
    monkeypatch.setattr(retries, "LONGEST_PAUSE", 0.01)
    batch_id = batch_of(store, 1)
    runs = failing(monkeypatch, *[OSError(28, "No space left on device")] * 8)

    async def go():
        async with serving(store, asked) as batches:
            while not (told := batches.waiting()):
                await asyncio.sleep(0.01)
            await ended(store, batch_id)
            while batches.waiting():
                await asyncio.sleep(0.01)
        monkeypatch.setattr(store_module, "found_full", lambda folder: disk._FULL)
        held = {batch_of(store, number) for number in (2, 3)}
        assert set(store.waiting(store.unfinished())) == held, "whoever runs them"
        return told

    (told,) = asyncio.run(asyncio.wait_for(go(), 20))
    assert runs and (told["id"], told["code"]) == (batch_id, "storage_full") and "disk is full" in told["message"]


def test_a_lock_that_cannot_be_made_is_waited_for(store, asked, monkeypatch, caplog):
    """It was tried every other second, with a traceback for each."""
    batch_id, real, tries = batch_of(store, 1), store.lock, 0

    def lock(batch_id):
        nonlocal tries
        tries += 1
        if tries < 4:
            raise OSError(28, "No space left on device")
        return real(batch_id)

    monkeypatch.setattr(store, "lock", lock)

    async def go():
        async with serving(store, asked):
            return await ended(store, batch_id)

    assert asyncio.run(go())["status"] == "completed"
    waited = [record for record in caplog.records if "waits" in record.message]
    assert len(waited) == 3 and not any(record.exc_info for record in caplog.records)


def test_one_that_another_replica_gets_on_with_waits_for_nothing(store, asked, monkeypatch):
    batch_id = batch_of(store, 1)
    failing(monkeypatch, OSError(28, "No space left on device"))

    async def go():
        async with serving(store, asked):
            while store.batch(batch_id)["errors"] is None:
                await asyncio.sleep(0.001)
            with Store(store.space._files.parent, 1 << 20, 100_000).lock(batch_id) as held:
                assert held
                while store.batch(batch_id)["errors"] is not None:
                    await asyncio.sleep(0.01)
            return await ended(store, batch_id)

    assert asyncio.run(asyncio.wait_for(go(), 20))["status"] == "completed"


def test_one_that_has_failed_and_is_cancelled_ends_at_once(store, clock, asked, monkeypatch):
    """It waited for as long as its next try was put off."""
    monkeypatch.setattr(retries, "FIRST_PAUSE", 3600.0)
    monkeypatch.setattr(retries, "LONGEST_PAUSE", 3600.0)
    batch_id, runs = batch_of(store, 1), failing(monkeypatch, OSError(107, "Transport endpoint is not connected"))

    async def go():
        async with serving(store, asked):
            while not runs:
                await asyncio.sleep(0.01)
            store.cancel(batch_id)
            return await ended(store, batch_id)

    assert asyncio.run(go())["status"] == "cancelled"


def test_a_failure_after_progress_is_the_first_one_again(store, asked, monkeypatch):
    batch_id = batch_of(store, 1, rows=12)
    real, kept = runner.BatchRun._write, 0

    def write(self, file, line):
        nonlocal kept
        kept += 1
        real(self, file, line)
        if kept % 2 == 0:
            raise RuntimeError("broken")

    monkeypatch.setattr(runner.BatchRun, "_write", write)

    async def go():
        async with serving(store, asked):
            return await ended(store, batch_id)

    batch = asyncio.run(go())
    assert batch["status"] == "completed" and batch["request_counts"]["completed"] == 12


def test_pauses_grow_until_there_is_progress(clock):
    tries = Retries(clock)
    assert tries.is_due("a")
    for number, pause in enumerate((30, 60, 120, 240, 480, 600, 600), 1):
        assert tries.failed("a", counts=number % 2 == 1) == (number + 1) // 2
        clock.now += pause - 1
        assert not tries.is_due("a") and tries.is_due("b")
        clock.now += 1
        assert tries.is_due("a")
    tries.forget("a")
    assert tries.failed("a", counts=True) == 1 == tries.failed("b", counts=True)
    tries.keep({"b", "c"})
    assert tries.is_due("a") and not tries.is_due("b")


def test_who_is_closed_as_a_batch_is_added_ends(store, asked, monkeypatch):
    """It looked on, and who closed it waited for ever."""
    monkeypatch.setattr(service, "_LOOK_SECONDS", 60.0)

    async def go():
        async with serving(store, asked) as batches:
            await asyncio.sleep(0.2)
            batches.added()
            await asyncio.wait_for(batches.close(), 10)

    asyncio.run(go())
