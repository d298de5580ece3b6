"""How a group comes by its experts: copies have the bits of what is read, whatever a peer does the load ends, in a
bounded time, and the faster source is taken. Limits are in virtual time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest
from copying import PAIRS, FakePeer, FakePeers, answer, checkpoint, empty_worker, held_bytes, holder, source
from native_there import require_native
from virtual_time import run_in_virtual_time

from isotherm.actors.experts import expert_loads
from isotherm.actors.experts.copy_choice import CACHED, LEAST_LIMIT, MOST_LIMIT, UNCACHED
from isotherm.actors.experts.copy_wire import ANSWER, NOT_HELD
from isotherm.actors.experts.expert_loads import ExpertLoad, ExpertLoads, NoMemoryError
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.messages.copies import CopySource

require_native()


async def sound(peer: FakePeer) -> None:
    while True:
        await peer.say(answer(await peer.question()))


class Played:
    """One load of PAIRS with such a peer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, serve, wish: str = "peer", sources=None, loads=None):
        self.loads = loads or ExpertLoads(empty_worker(), wish)  # type: ignore[arg-type]
        self.worker, self.told = self.loads.worker, list[float]()
        self.peers = FakePeers(serve)
        monkeypatch.setattr(expert_loads.PeerConnection, "open", self.peers.open)
        self.seconds = run_in_virtual_time(self._load([source()] if sources is None else sources))
        assert held_bytes(self.worker) == held_bytes(holder()), "bits are those of the checkpoint"
        assert self.told == sorted(self.told) and self.told[-1] == 1.0
        self.came = {kind: figures["experts"] for kind, figures in self.loads.told().items()}

    async def _load(self, sources: Sequence[CopySource]) -> float:
        with WeightReader(checkpoint()) as reader:
            await ExpertLoad(self.loads, reader, PAIRS, sources, self.told.append, lambda _: None).run()
        return asyncio.get_running_loop().time()


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch):
    return lambda *args, **kwargs: Played(monkeypatch, *args, **kwargs)


def test_who_holds_experts_takes_no_more_than_memory_allows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expert_loads, "machine_memory", lambda: 20 << 20)
    monkeypatch.setattr(expert_loads, "free_memory", lambda: 1 << 20)  # and a twentieth is kept
    worker = empty_worker()
    loads = ExpertLoads(worker, "checkpoint")
    with WeightReader(checkpoint()) as reader:
        loads.load(reader, PAIRS[:1])  # it was started with what it needs
        with pytest.raises(NoMemoryError, match=f"{len(PAIRS) - 1} more experts take .* 0 MiB for them"):
            loads.load(reader, PAIRS)
        assert worker.pairs() == [PAIRS[0]]
        monkeypatch.setattr(expert_loads, "free_memory", lambda: (1 << 20) + len(PAIRS) * worker.bank.nbytes)
        loads.load(reader, PAIRS)
    assert worker.held == len(PAIRS)


def test_a_load_ends_where_others_take_the_memory_meanwhile(monkeypatch: pytest.MonkeyPatch):
    """Each of several groups that take over a lost one's experts would find room for its own, and all together none."""
    monkeypatch.setattr(expert_loads, "machine_memory", lambda: 20 << 20)
    monkeypatch.setattr(expert_loads, "BATCH_BYTES", 1)  # a look after each expert
    free = iter([2 << 20, 2 << 20, 1 << 20])
    monkeypatch.setattr(expert_loads, "free_memory", lambda: next(free))
    worker = empty_worker()
    loads = ExpertLoads(worker, "checkpoint")
    with WeightReader(checkpoint()) as reader:
        loads.load(reader, PAIRS[:1])
        with pytest.raises(NoMemoryError, match="0 MiB for them"):
            loads.load(reader, PAIRS)
    assert worker.held == 3


def test_all_that_a_peer_holds_comes_from_it(play):
    played = play(sound)
    assert played.came == {"peer": len(PAIRS)} and played.peers.asked == list(PAIRS)
    assert played.loads.copied_bytes == played.worker.bank.nbytes
    experts, nbytes, _ = played.loads.figures()
    assert experts.values == {("peer",): len(PAIRS)} and nbytes.values == {("peer",): played.loads.copied_bytes}


def test_what_nobody_holds_is_read(play):
    played = play(sound, sources=[source(pairs=PAIRS[2:4]), source("expert-2", PAIRS[4:])])
    assert played.came == {"checkpoint": 2, "peer": 4} and played.peers.asked == list(PAIRS[2:])
    assert played.peers.opened == ["expert-1", "expert-2"]


async def hang_at_once(peer: FakePeer) -> None:
    await asyncio.Event().wait()


async def hang_in_the_middle(peer: FakePeer) -> None:
    await peer.say(answer(await peer.question()))
    await peer.say(answer(await peer.question())[:5000])
    await asyncio.Event().wait()


async def trickle(peer: FakePeer) -> None:
    for byte in answer(await peer.question()):
        await peer.say(bytes([byte]))
        await asyncio.sleep(0.1)


async def die_in_the_middle(peer: FakePeer) -> None:
    await peer.say(answer(await peer.question()))
    await peer.say(answer(await peer.question())[:5000])


async def give_other_bytes(peer: FakePeer) -> None:
    said = bytearray(answer(await peer.question()))
    said[len(said) // 2] ^= 1
    await peer.say(bytes(said))


async def give_another_form(peer: FakePeer) -> None:
    said = answer(await peer.question())
    await peer.say(said.replace(b"[1, 0, 0, 0, ", b"[1, 0, 0, 0, 9", 1))


async def say_nonsense(peer: FakePeer) -> None:
    await peer.say(bytes(range(1, 200)))


async def hold_nothing(peer: FakePeer) -> None:
    await peer.question()
    await peer.say(ANSWER.pack(NOT_HELD, 0))


FAULTS = {
    hang_at_once: (0, MOST_LIMIT),
    hang_in_the_middle: (1, MOST_LIMIT),
    trickle: (0, MOST_LIMIT),
    die_in_the_middle: (1, 0.0),
    give_other_bytes: (0, 0.0),
    give_another_form: (0, 0.0),
    say_nonsense: (0, 0.0),
    hold_nothing: (0, 0.0),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_checkpoint_has_what_a_peer_fails_to_give(play, caplog: pytest.LogCaptureFixture, fault):
    caplog.set_level(logging.WARNING)
    copied, seconds = FAULTS[fault]
    played = play(fault)
    assert played.came.get("peer", 0) == copied and played.came["checkpoint"] == len(PAIRS) - copied
    assert played.seconds == pytest.approx(seconds, abs=0.2)  # it is waited for once
    (line,) = caplog.messages
    assert line.startswith("expert-1 gives no more copies, the checkpoint has the rest: ")


def test_a_peer_that_cannot_be_reached(play, monkeypatch: pytest.MonkeyPatch):
    async def refused(self, offer):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(FakePeers, "open", refused)
    assert play(sound).came["checkpoint"] == len(PAIRS)


def test_one_peer_fails_and_another_does_not(play):
    seen: list[bool] = []

    async def first_hangs(peer: FakePeer) -> None:
        first = not seen
        seen.append(True)
        await (hang_at_once if first else sound)(peer)

    played = play(first_hangs, sources=[source(pairs=PAIRS[:3]), source("expert-2", PAIRS[3:])])
    assert played.came == {"peer": 3, "checkpoint": 3} and played.seconds == MOST_LIMIT


def test_a_peer_has_less_time_where_the_checkpoint_is_known_to_be_fast(play):
    loads = ExpertLoads(empty_worker(), "peer")
    loads.rates.note(UNCACHED, 1, 0.01, 0.0)
    assert play(hang_at_once, loads=loads).seconds == LEAST_LIMIT


@pytest.mark.parametrize("peer, checkpoint_takes, chosen", [(0.2, 0.1, "checkpoint"), (0.1, 0.2, "peer")])
def test_the_faster_source_is_taken(play, peer: float, checkpoint_takes: float, chosen: str):
    loads = ExpertLoads(empty_worker(), "auto")
    loads.rates.note("expert-1", 1, peer, 0.0)
    for kind in CACHED, UNCACHED:
        loads.rates.note(kind, 1, checkpoint_takes, 0.0)
    # Nothing takes time here, so the first batch shows that its source is faster still.
    assert play(sound, loads=loads).came == {chosen: len(PAIRS)}


def test_files_in_the_page_cache_are_faster_than_others(play, monkeypatch: pytest.MonkeyPatch):
    """The peer is faster than the disk, and slower than the page cache."""
    here = {name for pair in PAIRS[:2] for name in checkpoint().config.expert_projections(*pair)}
    monkeypatch.setattr(WeightReader, "is_cached", lambda reader, names: here.issuperset(names))
    monkeypatch.setattr(expert_loads.Rates, "note", lambda *_: None)
    monkeypatch.setattr(
        expert_loads.Rates, "of", lambda _, source, now: {CACHED: 0.1, "expert-1": 0.2, UNCACHED: 0.3}[source]
    )
    played = play(sound, "auto")
    assert played.came == {"checkpoint": 2, "peer": 4} and played.peers.asked == list(PAIRS[2:])


def test_both_are_tried_where_neither_is_known(play):
    played = play(sound, "auto")
    assert played.came["peer"] and played.came["checkpoint"]


@pytest.mark.parametrize("wish, tag", [("checkpoint", "tiles"), ("peer", "other tiles"), ("peer", None)])
def test_whose_bytes_are_of_no_use_is_not_asked(monkeypatch: pytest.MonkeyPatch, wish, tag):
    peers = FakePeers(sound)
    monkeypatch.setattr(expert_loads.PeerConnection, "open", peers.open)
    loads = ExpertLoads(empty_worker(), wish)
    with WeightReader(checkpoint()) as reader:
        loads.load(reader, PAIRS, [source()], tag)
    assert not peers.opened and loads.told()["checkpoint"]["experts"] == len(PAIRS)


def test_a_load_without_a_free_slot_fails_as_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expert_loads.PeerConnection, "open", FakePeers(sound).open)
    loads = ExpertLoads(empty_worker(2), "peer")
    with WeightReader(checkpoint()) as reader, pytest.raises(RuntimeError, match="no free expert slot"):
        loads.load(reader, PAIRS, [source()], "tiles")
    assert loads.worker.held == 2
