"""Runs one batch to its end: checks its rows, asks each once, writes what came of them, and publishes both files.

What was written is the state: whoever holds the batch's lock after a death goes on with the rows that have no line
yet."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, ParamSpec, TypeVar

from isotherm.cluster.api.batches.in_process import Answer
from isotherm.cluster.api.batches.rows import (
    Fault,
    Row,
    Tally,
    answered,
    check,
    choices,
    digest,
    lines,
    parse_row,
    unanswered,
)  # fmt: skip
from isotherm.cluster.api.batches.state import FINAL, moved
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.batches.stored import owner_of
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.jsontypes import JSON

log = logging.getLogger(__name__)
_BUSY = (429, 503)  # the server's matter, not the row's: asked again
_WHOSE = 401  # the batch's matter: rows are asked as the key that made it, which is no more, or as nobody
_LONGEST_PAUSE = 30.0  # seconds between two tries of a row
_ROOM_SECONDS = 5.0  # from one look whether there is room for more output to the next
_ROWS_AT_ONCE = 500  # written in one go, between which a run can be cancelled
_LOOK_SECONDS = 0.5  # from one look whether to stop, and one writing down of the counts, to the next
OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"

Ask = Callable[[str, JSON], Awaitable[Answer]]
P = ParamSpec("P")
T = TypeVar("T")


_FULL = Fault("storage_full", "the storage of this server's files is full; what was answered is in the output file")


class _GivenUp(Exception):
    """The batch is given up, for a reason that every row of it would meet."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class Places:
    """Choices that one replica generates at once for rows, of all its batches; `limit` may change."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self.limit = limit
        self._taken = 0
        self._left = asyncio.Condition()
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def take(self, count: int) -> AsyncIterator[None]:
        """So many of them, for a row; for one that wants more than there are, all."""
        # In turn, or rows that want little would pass one that wants much for ever.
        async with self._turn, self._left:
            await self._left.wait_for(lambda: self._taken == 0 or self._taken + count <= self.limit())
            self._taken += count
        try:
            yield
        finally:
            self._taken -= count
            async with self._left:
                self._left.notify_all()


@dataclass(frozen=True)
class RunSettings:
    max_body_bytes: int
    places: Places
    workers: int  # rows of one batch that wait for a place or have one


class BatchRun:
    """One batch, whose lock is held."""

    def __init__(self, store: Store, batch_id: str, ask: Ask, settings: RunSettings) -> None:
        self._store, self._ask, self._settings = store, ask, settings
        self._batch = store.stored(batch_id)
        self._tally = Tally()
        self._saw_room = 0.0  # on the event loop's clock
        self._fault: Fault | None = None  # for which it is given up

    async def run(self) -> None:
        """Until the batch is final. Cancelled, it is left for whoever goes on with it."""
        if self._batch["status"] == "validating":
            await self._check()
        if self._batch["status"] == "in_progress":
            await self._ask_rows()
        if self._batch["status"] == "finalizing":
            await self._publish(self._batch["then"])

    # --- the input ----------------------------------------------------------------------------------

    async def _check(self) -> None:
        try:
            total, faults = await asyncio.to_thread(self._checked)
        except ReplyError as error:  # deleted, or expired
            total, faults = 0, [Fault("invalid_input_file", error.message)]
        if faults:
            await self._move("failed", errors=_error_list(faults))
        else:
            await self._move("in_progress", request_counts={"total": total, "completed": 0, "failed": 0})

    def _checked(self) -> tuple[int, list[Fault]]:
        with open(self._store.content(self._batch["input_file_id"]), "rb") as file:
            return check(file, self._batch["endpoint"], self._settings.max_body_bytes)

    def _rows(self, file: BinaryIO) -> Iterator[Row]:
        """Those that have no line yet."""
        longest = self._settings.max_body_bytes
        for _, line in lines(file, longest):
            row = parse_row(line, self._batch["endpoint"], longest)
            if isinstance(row, Row) and digest(row.custom_id) not in self._tally.done:
                yield row

    # --- the rows -----------------------------------------------------------------------------------

    async def _ask_rows(self) -> None:
        batch_id = self._batch["id"]
        with ExitStack() as stack:
            written = [
                stack.enter_context(await asyncio.to_thread(self._store.lines_of, batch_id, name, self._tally.add))
                for name in (OUTPUT, ERRORS)
            ]
            output, errors = written
            file = stack.enter_context(open(self._store.input(self._batch), "rb"))
            rows = self._rows(file)
            reason = await self._work(rows, output, errors)
            if reason == "expired":
                rest = self._rows(file)
                while await _to_its_end(self._expire, islice(rest, _ROWS_AT_ONCE), errors):
                    pass
        await self._finalize(reason)

    def _expire(self, rows: Iterator[Row], errors: BinaryIO) -> bool:
        """Write that they were not asked → whether there were any."""
        some = False
        for row in rows:
            self._write(errors, unanswered(row.custom_id, "batch_expired", "its window was over before its turn"))
            some = True
        return some

    async def _work(self, rows: Iterator[Row], output: BinaryIO, errors: BinaryIO) -> str:
        """Ask rows until all are done, or the batch is to end → its next status."""

        turn = asyncio.Lock()

        async def take() -> Row | None:
            async with turn:  # the first one may be behind all that are done
                return await _to_its_end(lambda: next(rows, None))

        async def work() -> None:
            while (row := await take()) is not None:
                line = await self._answer(row)
                response = line["response"]
                good = response is not None and response["status_code"] == 200
                self._write(output if good else errors, line)

        workers = [asyncio.ensure_future(work()) for _ in range(self._settings.workers)]
        try:
            while True:
                done, left = await asyncio.wait(workers, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
                for worker in done:
                    worker.result()
                if not left:
                    return "completed"
                if await asyncio.to_thread(self._store.cancelling_at, self._batch["id"]) is not None:
                    return "cancelled"
                if self._store.clock() >= self._batch["expires_at"]:
                    return "expired"
                await self._look()
        except _GivenUp as end:
            self._fault = end.fault
            log.warning("batch %s is given up: %s", self._batch["id"], end)
            return "failed"
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _look(self) -> None:
        if self._counts() != self._batch["request_counts"]:
            self._batch = {**self._batch, "request_counts": self._counts(), "usage": self._tally.usage}
            await _to_its_end(self._store.save, self._batch)
        now = asyncio.get_running_loop().time()
        if now - self._saw_room >= _ROOM_SECONDS:
            self._saw_room = now
            if await asyncio.to_thread(self._store.space.is_full_for, owner_of(self._batch)):
                raise _GivenUp(_FULL)

    async def _answer(self, row: Row) -> JSON:
        """The row's output line. A server that has no room for it now is asked again, until it has. Raises _GivenUp
        where whoever made the batch may ask for nothing any more."""
        pause = 1.0
        while True:
            async with self._settings.places.take(choices(row.body)):
                answer = await self._ask(self._batch["endpoint"], row.body)
            if answer.status == _WHOSE:
                raise _GivenUp(Fault("invalid_api_key", str(answer.body["error"]["message"])))
            if answer.status not in _BUSY:
                request_id = answer.headers.get("x-request-id", "")
                return answered(row.custom_id, answer.status, request_id, answer.body)
            said = answer.headers.get("retry-after", "")
            wait = max(pause, float(said) if said.isdecimal() else 0.0)
            await asyncio.sleep(wait * random.uniform(0.75, 1.25))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _write(self, file: BinaryIO, line: JSON) -> None:
        left = memoryview(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        while left:
            left = left[file.write(left) :]
        self._tally.add(line)

    # --- the end ------------------------------------------------------------------------------------

    async def _finalize(self, then: str) -> None:
        fields = {"request_counts": self._counts(), "usage": self._tally.usage}
        if self._fault is not None:
            fields["errors"] = _error_list([self._fault])
        await self._move("finalizing", **fields, then=then)

    async def _publish(self, then: str) -> None:
        """Can be done twice, and is where a death comes between."""
        key = self._batch["id"].removeprefix("batch_")
        output = await _to_its_end(self._store.publish, self._batch, OUTPUT, f"file-{_derived(key, 1)}")
        errors = await _to_its_end(self._store.publish, self._batch, ERRORS, f"file-{_derived(key, 2)}")
        await self._move(then, output_file_id=output, error_file_id=errors, then=None)

    def _counts(self) -> JSON:
        total = self._batch["request_counts"]["total"]
        return {"total": total, "completed": self._tally.completed, "failed": self._tally.failed}

    async def _move(self, status: str, **fields: object) -> None:
        self._batch = moved(self._batch, status, self._store.clock(), **fields)
        await _to_its_end(self._store.save, self._batch)
        if status in FINAL:
            log.info("batch %s is %s: %s", self._batch["id"], status, self._batch["request_counts"])


async def _to_its_end(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a call gives that is made in a thread: the event loop is that of people's requests. Cancelled, it ends when
    the call has ended, since the batch is another's from then on."""
    called = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(called)
    except asyncio.CancelledError:
        await asyncio.gather(called, return_exceptions=True)
        raise


def failed(store: Store, batch_id: str, message: str) -> None:
    """Give a batch up, for a reason that is not in its rows. Its lock is held."""
    fields = {"errors": _error_list([Fault("internal_error", message)])}
    store.save(moved(store.stored(batch_id), "failed", store.clock(), **fields))


def _error_list(faults: list[Fault]) -> JSON:
    return {"object": "list", "data": [fault.as_json() for fault in faults]}


def _derived(key: str, which: int) -> str:
    """The id of a batch's output file, the same each time that it is published."""
    return f"{(int(key, 16) + which) % 16**32:032x}"
