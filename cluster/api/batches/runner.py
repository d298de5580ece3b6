"""Runs one batch to its end: checks its rows, asks each once, writes what came of them, and publishes both files.

What was written is the state: whoever holds the batch's lock after a death goes on with the rows that have no line
yet."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, ParamSpec, TypeVar

from isotherm.cluster.api.batches.disk import is_full
from isotherm.cluster.api.batches.in_process import Answer
from isotherm.cluster.api.batches.rows import (
    Fault,
    Row,
    Tally,
    answered,
    check,
    choices,
    digest,
    error_list,
    lines,
    parse_row,
    unanswered,
)  # fmt: skip
from isotherm.cluster.api.batches.state import FINAL, moved
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.batches.stored import owner_of
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.replies import to_json
from isotherm.cluster.background import pauses
from isotherm.cluster.jsontypes import JSON

log = logging.getLogger(__name__)
_BUSY = (429, 503)  # the server's matter, not the row's: asked again
# What a row is answered where the key that made the batch was revoked, or where the batch was made without one and the
# server has keys by now: no other row would be answered either.
_KEY_GONE = 401
_LONGEST_PAUSE = 30.0  # seconds between two tries of a row
_ROOM_SECONDS = 5.0  # from one look whether there is room for more output to the next
_ROWS_AT_ONCE = 500  # written in one go, between which a run can be cancelled
_FIRST_WRITING_PAUSE, _LONGEST_WRITING_PAUSE = 30.0, 300.0  # seconds from one try to write to the next
_LOOK_SECONDS = 0.5  # from one look whether to stop, and one writing down of the counts, to the next
OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"

Ask = Callable[[str, JSON], Awaitable[Answer]]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """How the asking of a batch's rows has ended: the batch's next status, and why it is given up where it is."""

    status: str
    fault: Fault | None = None


class _GivenUp(Exception):
    """The batch is given up, for a reason that every row of it would meet."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


_FULL = Fault("storage_full", "there is no more room for this key's files; what was answered is in the output file")


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

    def __init__(self, store: Store, batch: JSON, ask: Ask, settings: RunSettings) -> None:
        self._store, self._batch, self._ask, self._settings = store, batch, ask, settings
        self._tally = Tally()
        self._saw_room = self._next_save = 0.0  # on the event loop's clock
        self.written = 0  # rows

    async def run(self) -> None:
        """Until the batch is final. Cancelled, it is left for whoever goes on with it."""
        if self._batch["status"] == "validating":
            await self._check()
        if self._batch["status"] == "in_progress":
            await self._ask_rows()
        if self._batch["status"] == "finalizing":
            await self._publish(self._batch["then"])

    async def give_up(self, message: str) -> None:
        """After a failure that is not in its rows. Those that are done are published, unless that is what fails."""
        fault = Fault("internal_error", message)
        if self._batch["status"] == "finalizing":
            await self._move("failed", errors=error_list([fault]), then=None)
        else:
            await self._finalize(_End("failed", fault))
            await self._publish("failed")

    # --- the input ----------------------------------------------------------------------------------

    async def _check(self) -> None:
        try:
            total, faults = await asyncio.to_thread(self._checked)
        except ReplyError as error:  # deleted, or expired
            total, faults = 0, [Fault("invalid_input_file", error.message)]
        except FileNotFoundError:
            total, faults = 0, [Fault("invalid_input_file", "the content of this batch's input file is lost")]
        if faults:
            await self._move("failed", errors=error_list(faults))
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
            end = await self._work(rows, output, errors)
            if end.status == "expired":
                rest = self._rows(file)
                while await _to_its_end(self._expire, islice(rest, _ROWS_AT_ONCE), errors):
                    pass
        await self._finalize(end)

    def _expire(self, rows: Iterator[Row], errors: BinaryIO) -> bool:
        """Write that they were not asked → whether there were any."""
        some = False
        for row in rows:
            self._write(errors, unanswered(row.custom_id, "batch_expired", "its window was over before its turn"))
            some = True
        return some

    async def _work(self, rows: Iterator[Row], output: BinaryIO, errors: BinaryIO) -> _End:
        """Ask rows until all are done, or the batch is to end; of one that is to end already none."""
        if (over := await asyncio.to_thread(self._store.over, self._batch)) is not None:
            return _End(over)
        turn = asyncio.Lock()

        async def take() -> Row | None:
            async with turn:  # the first one may be behind all that are done
                return await _to_its_end(lambda: next(rows, None))

        async def work() -> None:
            while (row := await take()) is not None:
                line = await self._answer(row)
                response = line["response"]
                good = response is not None and response["status_code"] == 200
                await self._keep(output if good else errors, line)

        workers = [asyncio.ensure_future(work()) for _ in range(self._settings.workers)]
        try:
            return await self._end_of(workers)
        except _GivenUp as end:
            log.warning("batch %s is given up: %s", self._batch["id"], end)
            return _End("failed", end.fault)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _end_of(self, workers: Collection[asyncio.Future[None]]) -> _End:
        """What comes first: that they are done, or that the batch is to end. Raises _GivenUp, and what they raise."""
        while True:
            done, left = await asyncio.wait(workers, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
            for worker in done:
                worker.result()
            if not left:
                return _End("completed")
            if (over := await asyncio.to_thread(self._store.over, self._batch)) is not None:
                return _End(over)
            await self._look()

    async def _look(self) -> None:
        """Write down how far it has come. Raises _GivenUp where there is no room for more."""
        now = asyncio.get_running_loop().time()
        if self._counts() != self._batch["request_counts"] and now >= self._next_save:
            counted = {**self._batch, "request_counts": self._counts(), "usage": self._tally.usage}
            try:
                await _to_its_end(self._store.save, counted)
                self._batch = counted
            except OSError as error:  # the rows have their lines, or wait for them
                log.warning("the counts of batch %s cannot be written down: %s", self._batch["id"], error)
                self._next_save = now + _FIRST_WRITING_PAUSE
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
            if answer.status == _KEY_GONE:
                raise _GivenUp(Fault("invalid_api_key", str(answer.body["error"]["message"])))
            if answer.status not in _BUSY:
                request_id = answer.headers.get("x-request-id", "")
                return answered(row.custom_id, answer.status, request_id, answer.body)
            said = answer.headers.get("retry-after", "")
            wait = max(pause, float(said) if said.isdecimal() else 0.0)
            await asyncio.sleep(wait * random.uniform(0.75, 1.25))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _keep(self, file: BinaryIO, line: JSON) -> None:
        """Write a row's output line, once that can be done: on a full disk its answer waits here for room, and its
        worker asks nothing more meanwhile."""
        for pause in pauses(_FIRST_WRITING_PAUSE, _LONGEST_WRITING_PAUSE):
            try:
                return self._write(file, line)
            except OSError as error:
                if not is_full(error):  # the file is to be opened anew
                    raise
                batch_id = self._batch["id"]
                self._store.waits(batch_id, error)
                log.warning(
                    "an output line of batch %s cannot be written, next try in %g s: %s", batch_id, pause, error
                )
            await asyncio.sleep(pause)

    def _write(self, file: BinaryIO, line: JSON) -> None:
        """All of it or, where that raises OSError, nothing."""
        begin = file.seek(0, os.SEEK_END)
        left = memoryview(to_json(line) + b"\n")
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(begin)
            raise
        self._store.waits_no_more(self._batch["id"])
        self._tally.add(line)
        self.written += 1

    # --- the end ------------------------------------------------------------------------------------

    async def _finalize(self, end: _End) -> None:
        fields: dict[str, object] = {"then": end.status}
        if self._tally.done or self._batch["usage"] is None:  # else its lines could not be read
            fields |= {"request_counts": self._counts(), "usage": self._tally.usage}
        if end.fault is not None:
            fields["errors"] = error_list([end.fault])
        await self._move("finalizing", **fields)

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
        batch = moved(self._batch, status, self._store.clock(), **fields)
        await _to_its_end(self._store.save, batch)
        self._batch = batch
        if status in FINAL:
            log.info("batch %s is %s: %s", batch["id"], status, batch["request_counts"])


async def _to_its_end(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a call gives that is made in a thread: the event loop is that of people's requests. Cancelled, it ends when
    the call has ended, since the batch is another's from then on."""
    called = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(called)
    except asyncio.CancelledError:
        await asyncio.gather(called, return_exceptions=True)
        raise


def _derived(key: str, which: int) -> str:
    """The id of a batch's output file, the same each time that it is published."""
    return f"{(int(key, 16) + which) % 16**32:032x}"
