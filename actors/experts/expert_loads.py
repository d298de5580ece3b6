"""How an expert group comes by the experts that it is to hold: copied from peers that have them where that is faster,
read from the checkpoint else, and wherever a peer fails."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

from isotherm.actors.experts.copy_choice import CACHED, UNCACHED, Rates, choose, limit
from isotherm.actors.experts.copy_client import CopyError, PeerConnection
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.errors import IsothermError, named_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.machine_memory import free_memory, machine_memory
from isotherm.cluster.messages.copies import CopyFrom, CopySource, Pair
from isotherm.cluster.messages.figures import Family, Figures, Metric
from isotherm.kernels.expert_bank import ForeignBytesError

log = logging.getLogger(__name__)
KEPT_FREE = 1 / 20  # of the machine's memory, whatever more experts would be good for
BATCH_BYTES = 64 << 20  # of packed experts, after which it is decided anew where the next ones come from
_BY = ("source",)
EXPERTS = Metric("isotherm_group_experts_loaded_total", "Experts loaded, by where they came from", labels=_BY)
BYTES = Metric("isotherm_group_load_bytes_total", "Bytes that loaded experts came in", labels=_BY)
SECONDS = Metric("isotherm_group_load_seconds_total", "Seconds that loading experts took", labels=_BY)
PEER, CHECKPOINT = "peer", "checkpoint"


class NoMemoryError(IsothermError, RuntimeError):
    """More experts than the machine has memory for; who holds some already lives on as it is."""


class ExpertLoads:
    """Loads for one worker, one at a time, each in a thread that has no event loop."""

    def __init__(self, worker: ExpertWorker, wish: CopyFrom):
        self.worker, self.wish = worker, wish
        self.rates = Rates()
        self.copied_bytes = 0  # since the start
        self._came: dict[str, tuple[int, int, float]] = {}  # experts, bytes, seconds since the start, by where from

    def load(
        self,
        reader: WeightReader,
        pairs: Sequence[Pair],
        sources: Sequence[CopySource] = (),
        tag: str | None = None,
        progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Have (layer, expert) pairs; ones that are held already stay. `tag`: of what the worker packs itself; sources
        with another one are of no use. Raises CheckpointError, NoMemoryError, and RuntimeError when no slot is free."""
        # A worker that has none yet was started with what it needs.
        check = self._check_memory if self.worker.held else lambda _: None
        asyncio.run(ExpertLoad(self, reader, pairs, _usable(sources, tag, self.wish), progress, check).run())

    def _check_memory(self, more: int) -> None:
        """The system would end this worker, or a larger one, for experts that are a gain at best."""
        needed, kept = more * self.worker.bank.nbytes // self.worker.held, int(KEPT_FREE * machine_memory())
        if needed > (free := free_memory() - kept):
            raise NoMemoryError(
                f"{more} more experts take {needed >> 20} MiB, and the machine has {max(0, free) >> 20} MiB for them: "
                f"a twentieth of its memory ({kept >> 20} MiB) is kept free"
            )

    def note(self, source: str, kind: str, experts: int, nbytes: int, seconds: float, now: float) -> None:
        self.rates.note(source, experts, seconds, now)
        before = self._came.get(kind, (0, 0, 0.0))
        self._came[kind] = before[0] + experts, before[1] + nbytes, before[2] + seconds

    def figures(self) -> Figures:
        came = dict(self._came)
        return [
            Family(metric, {(kind,): counts[i] for kind, counts in came.items()})
            for i, metric in enumerate((EXPERTS, BYTES, SECONDS))
        ]

    def told(self) -> JSON:
        """What has come from where since the start, and how fast."""
        return {
            kind: {"experts": experts, "bytes": nbytes, "bytes_per_second": round(nbytes / seconds) if seconds else 0}
            for kind, (experts, nbytes, seconds) in self._came.items()
        }


def _usable(sources: Sequence[CopySource], tag: str | None, wish: CopyFrom) -> list[CopySource]:
    out = []
    for source in sources if wish != "checkpoint" else ():
        if source.offer.tag == tag:
            out.append(source)
        else:
            log.info("%s packs its experts otherwise: %s, not %s", source.offer.group, source.offer.tag, tag)
    return out


class ExpertLoad:
    """One load. Its time is its event loop's. `check` is told how many experts are still to come, again and again, for
    others may load at the same time; what it raises ends the load."""

    def __init__(
        self,
        loads: ExpertLoads,
        reader: WeightReader,
        pairs: Iterable[Pair],
        sources: Sequence[CopySource],
        progress: Callable[[float], None],
        check: Callable[[int], None],
    ):
        self._loads, self._worker, self._reader, self._progress = loads, loads.worker, reader, progress
        self._check, self._next_check = check, 0.0  # experts that have come by then
        self._wanted = [pair for pair in dict.fromkeys(pairs) if not self._worker.holds(*pair)]
        self._source_of = {pair: s for s in sources for pair in s.pairs}
        self._open: dict[str, PeerConnection] = {}
        self._done = 0
        self._from: Counter[str] = Counter()  # experts by where they came from
        self._why: dict[str, str] = {}  # group → why it was copied from last, or why no more

    async def run(self) -> None:
        begin = asyncio.get_running_loop().time()
        if self._wanted:
            self._check(len(self._wanted))
            self._next_check = self._batch()
        try:
            # What nobody else has comes first: it shows how fast the checkpoint is.
            self._read([pair for pair in self._wanted if pair not in self._source_of])
            rest = [pair for pair in self._wanted if pair in self._source_of]
            while rest:
                rest = rest[await self._next(rest) :]
        finally:
            for connection in self._open.values():
                connection.close()
        seconds = asyncio.get_running_loop().time() - begin
        parts = [f"{count} from {where}" for where, count in self._from.items()]
        parts += [f"{group}: {why}" for group, why in self._why.items()]
        log.info("loaded %d experts in %.2f s; %s", len(self._wanted), seconds, "; ".join(parts) or "all were here")

    async def _next(self, rest: list[Pair]) -> int:
        """Load the first of these, as many as come from one source before that is decided anew; how many."""
        source = self._source_of.get(rest[0])
        if source is None:
            count = len(list(takewhile(lambda pair: pair not in self._source_of, rest)))
            self._read(rest[:count])
            return count
        now, kind = asyncio.get_running_loop().time(), self._checkpoint(rest[0])
        rates, group = self._loads.rates, source.offer.group
        choice = choose(self._loads.wish, rates.of(group, now), rates.of(kind, now))
        self._why[group] = choice.why
        batch = rest[: self._batch()]
        if not choice.from_peer:
            batch = list(takewhile(lambda pair: self._checkpoint(pair) == kind, batch))
            self._read(batch)
            return len(batch)
        return await self._copy(source, list(takewhile(lambda pair: self._source_of.get(pair) is source, batch)))

    def _batch(self) -> int:
        each = self._worker.bank.nbytes // max(1, self._worker.held)
        return max(1, BATCH_BYTES // each) if each else 1

    def _checkpoint(self, pair: Pair) -> str:
        return CACHED if self._reader.is_cached(self._worker.config.expert_projections(*pair)) else UNCACHED

    def _read(self, pairs: list[Pair]) -> None:
        if not pairs:
            return
        clock, kind, before = asyncio.get_running_loop().time, self._checkpoint(pairs[0]), self._reader.bytes_read
        begin = clock()
        self._worker.load(self._reader, pairs, lambda part: self._tell(self._done + part * len(pairs)))
        self._done += len(pairs)
        nbytes = self._reader.bytes_read - before
        self._loads.note(kind, CHECKPOINT, len(pairs), nbytes, clock() - begin, clock())
        self._from["the checkpoint"] += len(pairs)

    async def _copy(self, source: CopySource, pairs: list[Pair]) -> int:
        """How many of these have come from the peer; where it fails it is asked no more."""
        clock, group, rates = asyncio.get_running_loop().time, source.offer.group, self._loads.rates
        begin, count, nbytes = clock(), 0, 0
        known = [took for kind in (CACHED, UNCACHED) if (took := rates.of(kind, begin)) is not None]
        seconds, failure = limit(max(known, default=None)), ""
        try:
            for pair in pairs:
                nbytes += await asyncio.wait_for(self._copy_one(source, pair), seconds)
                count += 1
                self._tell(self._done + count)
        except asyncio.TimeoutError:
            failure = f"one has not come within {seconds:.1f} s"
        except (CopyError, ForeignBytesError, OSError) as error:
            failure = named_line(error)
        self._done += count
        self._loads.note(group, PEER, count, nbytes, clock() - begin, clock())
        self._from[group] += count
        if failure:
            log.warning("%s gives no more copies, the checkpoint has the rest: %s", group, failure)
            rates.note(group, 0, 0.0, clock())
            self._why[group] = failure
            self._source_of = {pair: other for pair, other in self._source_of.items() if other is not source}
        return count

    async def _copy_one(self, source: CopySource, pair: Pair) -> int:
        """Its bytes."""
        group = source.offer.group
        if (connection := self._open.get(group)) is None:
            connection = self._open[group] = await PeerConnection.open(source.offer)
        packed = await connection.expert(self._worker.bank, *pair)
        self._worker.take(*pair, packed)
        nbytes = sum(map(len, packed.parts))
        self._loads.copied_bytes += nbytes
        return nbytes

    def _tell(self, done: float) -> None:
        self._progress(done / len(self._wanted))
        if done >= self._next_check and (left := len(self._wanted) - int(done)):
            self._check(left)
            self._next_check = done + self._batch()
