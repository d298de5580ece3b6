"""One batch from its file to its end: each row once, whatever happens in between."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import threading
import time

import pytest
from starlette.datastructures import Headers
from waiting import until

from isotherm.cluster.api.batches import runner, stored
from isotherm.cluster.api.batches.in_process import Answer
from isotherm.cluster.api.batches.runner import BatchRun, Places, RunSettings
from isotherm.cluster.api.batches.state import FINAL, moved, new_batch
from isotherm.cluster.api.batches.store import Store

URL = "/v1/completions"
COUNTS = {"completed": 0, "failed": 0}


class Clock:
    now = 5000.0

    def __call__(self):
        return self.now


class Server:
    """Answers rows by what their body's `say` asks for, and notes them."""

    def __init__(self):
        self.asked: list[str] = []
        self.open = self.most = 0
        self.delay = 0.0
        self.busy = 0  # so many answers that say "later"

    async def __call__(self, url, body):
        assert url == URL
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.open -= 1
        if self.busy:
            self.busy -= 1
            return Answer(503 if self.busy % 2 else 429, Headers({"retry-after": "0"}), {"error": {}})
        self.asked.append(body["prompt"])
        status = body.get("status", 200)
        if status == 401:
            return Answer(401, Headers(), {"error": {"message": "whose is it?"}})
        used = {"prompt_tokens": 2, "completion_tokens": 3}
        return Answer(status, Headers({"x-request-id": "r"}), {"usage": used, "echo": body["prompt"]})


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    return Store(tmp_path, 1 << 20, 100_000, clock)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(runner, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(runner, "_ROOM_SECONDS", 0.01)
    return Server()


def batch_of(store, *bodies, content=None, owner=""):
    rows = [{"custom_id": f"row {body['prompt']}", "method": "POST", "url": URL, "body": body} for body in bodies]
    path = store.new_upload()
    path.write_bytes(content if content is not None else "\n".join(map(json.dumps, rows)).encode())
    file = store.add_file(path, "in.jsonl", "batch", owner=owner)
    batch = new_batch("batch_" + "a" * 32, URL, file["id"], "1h", None, None, store.clock(), owner)
    store.add_batch(batch)
    return batch["id"]


def prompts(count, **rest):
    return [{"prompt": str(i), **rest} for i in range(count)]


async def run(store, batch_id, server, places=4):
    settings = RunSettings(100_000, Places(lambda: places), 8)
    await BatchRun(store, store.stored(batch_id), server, settings).run()
    return store.batch(batch_id)


def output(store, file_id):
    return [] if file_id is None else [json.loads(line) for line in store.content(file_id).read_bytes().splitlines()]


def test_every_row_is_asked_once_and_the_files_are_openais(store, server):
    server.delay = 0.001
    batch_id = batch_of(store, *prompts(20), {"prompt": "bad", "status": 400})
    batch = asyncio.run(run(store, batch_id, server))
    assert batch["status"] == "completed"
    assert all(batch[f"{status}_at"] for status in ("created", "in_progress", "finalizing", "completed"))
    assert batch["request_counts"] == {"total": 21, "completed": 20, "failed": 1}
    assert batch["usage"]["total_tokens"] == 100
    assert sorted(server.asked) == sorted([*map(str, range(20)), "bad"]) and 1 < server.most <= 4
    good, (failed,) = output(store, batch["output_file_id"]), output(store, batch["error_file_id"])
    assert {line["custom_id"] for line in good} == {f"row {i}" for i in range(20)}
    assert all(set(line) == {"id", "custom_id", "response", "error"} for line in good)
    assert good[0]["response"]["status_code"] == 200 and good[0]["response"]["request_id"] == "r"
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("row bad", 400)


def test_a_line_has_no_other_line_ends_in_it(store, server):
    """JSON leaves them as they are, and whoever reads the file by str.splitlines has half a row there."""
    asked = [{"prompt": f"{status}{end}b", "status": status} for end in "\u2028\u2029\x85" for status in (200, 400)]
    batch = asyncio.run(run(store, batch_of(store, *asked), server))
    for which, name in ((200, "output_file_id"), (400, "error_file_id")):
        text = store.content(batch[name]).read_text()
        found = {json.loads(line)["response"]["body"]["echo"] for line in text.splitlines()}
        assert found == {row["prompt"] for row in asked if row["status"] == which}


def test_faults_in_the_file_fail_the_batch_before_a_row_is_asked(store, server):
    batch = asyncio.run(run(store, batch_of(store, content=b'{"custom_id": 1}\n{'), server))
    assert batch["status"] == "failed" and batch["failed_at"] and not server.asked
    assert [error["line"] for error in batch["errors"]["data"]] == [1, 2]


def test_a_file_that_is_gone_fails_the_batch(store, server, clock):
    batch_id = batch_of(store, *prompts(1))
    clock.now += 200_000
    batch = asyncio.run(run(store, batch_id, server))
    assert batch["status"] == "failed" and batch["errors"]["data"][0]["code"] == "invalid_input_file"


def test_a_busy_server_is_asked_again(store, server, monkeypatch):
    monkeypatch.setattr(runner, "_LONGEST_PAUSE", 0.01)
    real_sleep = asyncio.sleep
    monkeypatch.setattr(runner.asyncio, "sleep", lambda seconds: real_sleep(min(seconds, 0.01)))
    server.busy = 5
    batch = asyncio.run(run(store, batch_of(store, *prompts(3)), server))
    assert batch["request_counts"] == {"total": 3, "completed": 3, "failed": 0} and len(server.asked) == 3


def test_a_death_in_the_middle_costs_the_rows_that_were_under_way_at_most(store, server):
    server.delay = 0.01
    batch_id = batch_of(store, *prompts(40))

    async def killed():
        task = asyncio.ensure_future(run(store, batch_id, server))
        while len(server.asked) < 10:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(killed())
    assert store.batch(batch_id)["status"] == "in_progress"
    before = len(server.asked)
    batch = asyncio.run(run(store, batch_id, server))
    assert batch["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    lines = output(store, batch["output_file_id"])
    assert sorted(line["custom_id"] for line in lines) == sorted(f"row {i}" for i in range(40))
    assert before < 40 and len(server.asked) <= 40 + 4


def test_a_death_while_it_finalizes_is_gone_on_from(store, server, monkeypatch):
    batch_id = batch_of(store, *prompts(3))
    monkeypatch.setattr(BatchRun, "_publish", lambda self, then: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run(store, batch_id, server))
    assert store.batch(batch_id)["status"] == "finalizing"
    monkeypatch.undo()
    batch = asyncio.run(run(store, batch_id, server))
    assert batch["status"] == "completed" and len(output(store, batch["output_file_id"])) == 3 == len(server.asked)


def test_cancelling_ends_what_runs_and_keeps_what_is_done(store, server):
    server.delay = 0.02
    batch_id = batch_of(store, *prompts(100))

    async def go():
        task = asyncio.ensure_future(run(store, batch_id, server))
        while len(server.asked) < 5:
            await asyncio.sleep(0.001)
        store.cancel(batch_id)
        return await task

    batch = asyncio.run(go())
    assert batch["status"] == "cancelled" and batch["cancelled_at"] and server.open == 0
    assert 0 < batch["request_counts"]["completed"] == len(output(store, batch["output_file_id"])) < 100


def test_when_the_window_is_over_the_other_rows_say_so(store, server, clock):
    server.delay = 0.02
    batch_id = batch_of(store, *prompts(60))

    async def go():
        task = asyncio.ensure_future(run(store, batch_id, server))
        while len(server.asked) < 5:
            await asyncio.sleep(0.001)
        clock.now += 3601
        return await task

    batch = asyncio.run(go())
    assert batch["status"] == "expired" and batch["expired_at"]
    good, late = output(store, batch["output_file_id"]), output(store, batch["error_file_id"])
    assert {line["error"]["code"] for line in late} == {"batch_expired"} and len(good) + len(late) == 60
    assert batch["request_counts"] == {"total": 60, "completed": len(good), "failed": len(late)}


def test_a_full_disk_fails_the_batch_and_keeps_what_is_done(tmp_path, server, clock):
    store = Store(tmp_path, 6000, 100_000, clock)
    server.delay = 0.005
    batch = asyncio.run(run(store, batch_of(store, *prompts(50)), server))
    assert batch["status"] == "failed" and batch["errors"]["data"][0]["code"] == "storage_full"
    assert 0 < len(output(store, batch["output_file_id"])) < 50


def test_what_another_key_keeps_fails_nobodys_batch(store, server):
    server.delay = 0.005
    path = store.new_upload()
    path.write_bytes(b"x" * (1 << 20))
    store.add_file(path, "in.jsonl", "batch", owner="other")
    assert store.space.left("mine") < 0
    batch = asyncio.run(run(store, batch_of(store, *prompts(50), owner="mine"), server))
    assert batch["status"] == "completed" and batch["request_counts"]["completed"] == 50


def test_places_follow_their_limit():
    async def go():
        limit, inside, most = 2, 0, 0
        places = Places(lambda: limit)

        async def one():
            nonlocal inside, most
            async with places.take(1):
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0.001)
                inside -= 1

        await asyncio.gather(*(one() for _ in range(10)))
        assert most == 2
        limit = 5
        await asyncio.gather(*(one() for _ in range(20)))
        return most

    assert asyncio.run(go()) == 5


def test_a_row_takes_a_place_for_each_choice(store, server):
    server.delay = 0.002
    bodies = prompts(10, n=2) + [{"prompt": f"big {i}", "n": 9} for i in range(2)]
    batch = asyncio.run(run(store, batch_of(store, *bodies), server, places=4))
    assert batch["request_counts"] == {"total": 12, "completed": 12, "failed": 0} and server.most == 2


def test_rows_that_want_little_do_not_pass_one_that_wants_much():
    async def go():
        places, order = Places(lambda: 4), []

        async def one(name, count):
            async with places.take(count):
                order.append(name)
                await asyncio.sleep(0.001)

        await asyncio.gather(one("first", 3), one("much", 4), *(one(f"little {i}", 1) for i in range(5)))
        return order

    assert asyncio.run(go()) == ["first", "much", *(f"little {i}" for i in range(5))]


@pytest.mark.parametrize("ends", ["completed", "expired"])
def test_the_event_loop_waits_for_no_row_and_no_file(store, server, clock, monkeypatch, ends):
    """Of a batch that is gone on with, and that ends."""
    batch_id = batch_of(store, *prompts(40))
    server.delay = 0.01
    on_loop = []

    def watched(of, name):
        real = getattr(of, name)

        def call(*args):
            if threading.current_thread() is threading.main_thread():
                on_loop.append(name)
            return real(*args)

        monkeypatch.setattr(of, name, call)

    async def go():
        task = asyncio.ensure_future(run(store, batch_id, server))
        while len(server.asked) < 10:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        task = asyncio.ensure_future(run(store, batch_id, server))
        while len(server.asked) < 20:
            await asyncio.sleep(0.001)
        clock.now += 3601 if ends == "expired" else 0
        return await task

    watched(runner, "parse_row")
    for name in ("save", "publish", "cancelling_at", "lines_of"):
        watched(store, name)
    batch = asyncio.run(go())
    on_loop.remove("cancelling_at")  # of `store.batch` in `run`
    assert batch["status"] == ends and on_loop == []
    done = output(store, batch["output_file_id"]) + output(store, batch["error_file_id"])
    assert sorted(line["custom_id"] for line in done) == sorted(f"row {i}" for i in range(40))


def test_a_run_that_is_cancelled_ends_when_its_last_call_has(store, server, monkeypatch):
    """Else it would write down what it knew after another has gone on."""
    batch_id = batch_of(store, *prompts(40))
    server.delay = 0.01
    real, begun, ended = store.save, threading.Event(), threading.Event()

    def slow(batch):
        begun.set()
        time.sleep(0.1)
        real(batch)
        ended.set()

    async def go():
        monkeypatch.setattr(store, "save", slow)
        task = asyncio.ensure_future(run(store, batch_id, server))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(go())


def test_a_batch_whose_maker_may_not_ask_any_more_ends_as_a_whole(store, server):
    """With the rows that were done by then, one reason, and no line for each row that would meet it."""
    batch_id = batch_of(store, *prompts(3), *({"prompt": f"not {i}", "status": 401} for i in range(50)))
    batch = asyncio.run(run(store, batch_id, server, places=1))
    assert batch["status"] == "failed"
    assert batch["errors"]["data"] == [
        {"code": "invalid_api_key", "message": "whose is it?", "param": None, "line": None}
    ]
    assert batch["request_counts"] == {"total": 53, "completed": 3, "failed": 0}
    assert len(output(store, batch["output_file_id"])) == 3 and batch["error_file_id"] is None
    assert len(server.asked) < 3 + 9, "those that were on their way"


class FullDisk:
    """Takes `room` bytes of output, and no other file meanwhile."""

    def __init__(self, store, monkeypatch, room=0):
        self.room: float = room
        real_lines, real_sync = store.lines_of, stored.os.fsync

        def sync(file):
            if self.room != math.inf:
                raise OSError(errno.ENOSPC, "No space left on device")
            real_sync(file)

        monkeypatch.setattr(store, "lines_of", lambda *args: Output(self, real_lines(*args)))
        monkeypatch.setattr(stored.os, "fsync", sync)


class Output:
    def __init__(self, disk, file):
        self._disk, self._file, self.seek, self.truncate = disk, file, file.seek, file.truncate

    def write(self, part):
        if self._disk.room == math.inf:
            return self._file.write(part)
        fits = min(len(part), self._disk.room)
        self._disk.room -= fits
        if not fits:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(part[:fits])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def run_of(store, server, batch_id):
    """Of a batch of 40 rows, eight at once."""
    batch = moved(store.stored(batch_id), "in_progress", 1, request_counts={"total": 40} | COUNTS)
    return BatchRun(store, batch, server, RunSettings(100_000, Places(lambda: 4), 8))


def test_a_full_disk_is_waited_for_and_no_answer_is_thrown_away(store, server, monkeypatch, tmp_path):
    batch_id = batch_of(store, *prompts(40))
    monkeypatch.setattr(runner, "_FIRST_WRITING_PAUSE", 0.01)
    monkeypatch.setattr(runner, "_LONGEST_WRITING_PAUSE", 0.02)

    async def go():
        disk = FullDisk(store, monkeypatch, room=500)
        task = asyncio.ensure_future(run_of(store, server, batch_id).run())
        await asyncio.to_thread(until, lambda: store.batch(batch_id)["errors"])
        await asyncio.sleep(0.1)  # in which more would be asked, if it did not wait
        before = len(server.asked)
        assert not task.done() and before <= 8 + 3, "rows that were written, and one for each worker"
        seen = store.batch(batch_id)
        assert seen["status"] not in FINAL and seen["errors"]["data"][0]["code"] == "storage_full", "it looked healthy"
        assert not list((tmp_path / "batches" / batch_id).glob(".*"))
        disk.room = math.inf
        await task

    asyncio.run(go())
    batch = store.batch(batch_id)
    assert batch["status"] == "completed" and batch["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    assert batch["errors"] is None
    assert sorted(server.asked) == sorted(map(str, range(40))), "none twice"
    assert len(output(store, batch["output_file_id"])) == 40


def test_a_file_that_is_lost_is_opened_anew_by_whoever_runs_the_batch_again(store, server, monkeypatch):
    """A folder that was mounted again leaves a descriptor on which nothing can ever be written."""
    batch_id = batch_of(store, *prompts(40))
    monkeypatch.setattr(Output, "write", lambda self, part: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale")))

    async def go():
        FullDisk(store, monkeypatch, room=math.inf)
        with pytest.raises(OSError, match="stale"):
            await asyncio.wait_for(run_of(store, server, batch_id).run(), 10)

    asyncio.run(go())


def test_a_batch_whose_disk_stays_full_can_be_cancelled(store, server, monkeypatch):
    batch_id = batch_of(store, *prompts(40))

    async def go():
        disk = FullDisk(store, monkeypatch, room=500)
        task = asyncio.ensure_future(run_of(store, server, batch_id).run())
        await asyncio.to_thread(until, lambda: store.batch(batch_id)["errors"])
        assert not task.done()
        monkeypatch.setattr(stored.os, "fsync", lambda file: None)
        store.cancel(batch_id)
        await task
        assert disk.room == 0

    asyncio.run(go())
    batch = store.batch(batch_id)
    lines = output(store, batch["output_file_id"])
    assert batch["status"] == "cancelled" and 0 < len(lines) == batch["request_counts"]["completed"] < 8


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_of_a_batch_that_is_over_before_its_turn_no_row_is_asked(store, server, clock, how):
    batch_id = batch_of(store, *prompts(20))
    if how == "cancelled":
        store.cancel(batch_id)
    else:
        clock.now += 3600
    batch = asyncio.run(run(store, batch_id, server))
    assert batch["status"] == how and not server.asked
    late = output(store, batch["error_file_id"])
    assert len(late) == (20 if how == "expired" else 0) and batch["output_file_id"] is None
    assert batch["usage"]["total_tokens"] == 0


def test_a_batch_that_is_given_up_has_the_rows_that_were_done(store, server):
    server.delay = 0.01
    batch_id = batch_of(store, *prompts(10), {"prompt": "breaks", "status": None})

    async def breaks(url, body):
        if body["prompt"] == "breaks":
            await asyncio.sleep(0.05)
            raise ZeroDivisionError
        return await server(url, body)

    async def go():
        batch_run = BatchRun(store, store.stored(batch_id), breaks, RunSettings(100_000, Places(lambda: 4), 2))
        with pytest.raises(ZeroDivisionError):
            await batch_run.run()
        await batch_run.give_up("it broke")

    asyncio.run(go())
    batch = store.batch(batch_id)
    assert batch["status"] == "failed" and batch["errors"]["data"][0]["code"] == "internal_error"
    assert batch["errors"]["data"][0]["message"] == "it broke" and batch["usage"]["total_tokens"] == 50
    assert len(output(store, batch["output_file_id"])) == 10 == batch["request_counts"]["completed"]


def test_a_batch_that_cannot_be_published_is_given_up_without_its_files(store, server, monkeypatch):
    batch_id = batch_of(store, *prompts(3))

    async def go():
        batch_run = BatchRun(store, store.stored(batch_id), server, RunSettings(100_000, Places(lambda: 4), 2))
        monkeypatch.setattr(store, "publish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await batch_run.run()
        await batch_run.give_up("it broke")

    asyncio.run(go())
    batch = store.batch(batch_id)
    assert (batch["status"], batch["output_file_id"], batch["request_counts"]["completed"]) == ("failed", None, 3)


def test_a_batch_whose_input_is_lost_fails(store, server):
    batch_id = batch_of(store, *prompts(3))
    store.input(store.stored(batch_id)).unlink()
    batch = asyncio.run(run(store, batch_id, server))
    assert batch["status"] == "failed" and batch["errors"]["data"][0]["code"] == "invalid_input_file"
