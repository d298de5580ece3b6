from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepseek_checkpoints import make_checkpoint, make_tensors
from exchange_parts import dispatch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotherm.actors.attention.exchange import ExpertExchange
from isotherm.actors.attention.lost_experts import ExpertsFailedError, ExpertsLostError
from isotherm.actors.attention.row_split import LayerTable, layer_tables, split_rows
from isotherm.actors.experts.worker import ExpertWorker
from isotherm.actors.links.in_process import InProcessLink
from isotherm.actors.links.protocol import Dispatch, ExpertNotHeldError, GroupFailedError, LinkError
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.placement.table import Placement, contiguous_placement
from isotherm.kernels.reference import ReferenceKernels

EXPERTS, LAYERS = 12, (1, 2)


# --- the split ------------------------------------------------------------------------------------


@st.composite
def splits(draw: st.DrawFn) -> tuple[np.ndarray, LayerTable, int]:
    """Router ids, a layer's table and a turn."""
    experts, groups = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    holders = [
        draw(st.lists(st.integers(0, groups - 1), min_size=1, max_size=groups, unique=True)) for _ in range(experts)
    ]
    names = tuple(f"g{i}" for i in range(groups))
    placement = Placement(1, (3,), (tuple(tuple(names[g] for g in h) for h in holders),))
    top_k = draw(st.integers(1, experts))
    rows = draw(st.lists(st.permutations(range(experts)), min_size=1, max_size=12))
    ids = np.array([sorted(row[:top_k]) for row in rows], dtype=np.int32)
    return ids, layer_tables(placement, names)[3], draw(st.integers(0, 1000))


@given(splits())
def test_every_pair_goes_to_one_group_that_holds_its_expert(split: tuple[np.ndarray, LayerTable, int]):
    ids, table, turn = split
    shares = split_rows(ids, table, turn)
    assert [s.group for s in shares] == sorted({s.group for s in shares})
    assert sorted(np.concatenate([s.pairs_P for s in shares]).tolist()) == list(range(ids.size))
    for share in shares:
        pairs = len(share.pairs_P)
        assert pairs > 0 and len(share.rows_P) == pairs
        # Pairs are grouped by ascending expert, and offsets are where each begins.
        assert (np.diff(share.experts_A) > 0).all()
        assert len(share.offsets_A1) == len(share.experts_A) + 1
        assert share.offsets_A1[0] == 0 and share.offsets_A1[-1] == pairs and (np.diff(share.offsets_A1) > 0).all()
        expert_of_pair = np.repeat(share.experts_A, np.diff(share.offsets_A1))
        assert (expert_of_pair == ids.ravel()[share.pairs_P]).all()
        assert (share.rows_U[share.rows_P] == share.pairs_P // ids.shape[1]).all()
        assert share.rows_U.tolist() == sorted(set(share.rows_U.tolist())) and set(share.rows_P.tolist()) == set(
            range(len(share.rows_U))
        )
        assert all(share.group in table.copies[e, : table.count[e]] for e in share.experts_A)
        assert (share.rows_P.dtype, share.experts_A.dtype, share.offsets_A1.dtype) == (np.int32, np.int32, np.int32)


@given(splits())
def test_an_experts_copies_get_its_rows_in_turn(split: tuple[np.ndarray, LayerTable, int]):
    ids, table, turn = split
    work: dict[int, Counter[int]] = {}
    for share in split_rows(ids, table, turn):
        for expert, count in zip(share.experts_A.tolist(), np.diff(share.offsets_A1).tolist(), strict=True):
            work.setdefault(expert, Counter())[share.group] += count
    for expert, counts in work.items():
        copies = table.copies[expert, : table.count[expert]].tolist()
        per_copy = [counts[g] for g in copies]
        assert max(per_copy) - min(per_copy) <= 1
        assert per_copy[turn % len(copies)] == max(per_copy), "the first row goes to copy `turn`"


def test_single_rows_reach_every_copy_over_the_turns():
    table = layer_tables(Placement(1, (0,), ((("a", "b", "c"),),)), ("a", "b", "c"))[0]
    ids = np.zeros((1, 1), dtype=np.int32)
    assert Counter(split_rows(ids, table, turn)[0].group for turn in range(9)) == {0: 3, 1: 3, 2: 3}


def test_a_split_written_out():
    placement = Placement(1, (0,), ((("a",), ("b",), ("a", "b"), ("b",)),))
    ids = np.array([[0, 2], [1, 2], [0, 2]], dtype=np.int32)
    a, b = split_rows(ids, layer_tables(placement, ("a", "b"))[0])
    assert (a.group, a.rows_U.tolist(), a.rows_P.tolist(), a.experts_A.tolist(), a.offsets_A1.tolist(),
            a.pairs_P.tolist()) == (
        0, [0, 2], [0, 1, 0, 1], [0, 2], [0, 2, 4], [0, 4, 1, 5])  # fmt: skip
    assert (b.group, b.rows_U.tolist(), b.rows_P.tolist(), b.experts_A.tolist(), b.offsets_A1.tolist(),
            b.pairs_P.tolist()) == (
        1, [1], [0, 0], [1, 2], [0, 1, 2], [2, 3])  # fmt: skip


# --- workers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), dtype="float32", shards=2))


@pytest.fixture
def reader(checkpoint: Checkpoint) -> Iterator[WeightReader]:
    with WeightReader(checkpoint) as reader:
        yield reader


KERNELS = ReferenceKernels(torch.float32)


def make_worker(reader: WeightReader, held: list[tuple[int, int]], slots: int | None = None) -> ExpertWorker:
    worker = ExpertWorker(reader.checkpoint.config, KERNELS, len(held) if slots is None else slots)
    worker.load(reader, held)
    return worker


def expert_output(reader: WeightReader, layer: int, expert: int, x: Tensor) -> Tensor:
    """One row through one expert, written out."""
    p = f"model.layers.{layer}.mlp.experts.{expert}"
    gate, up, down = (reader.tensor(f"{p}.{n}_proj.weight").float() for n in ("gate", "up", "down"))
    return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))


def one_pair(layer: int, expert: int, x_UD: Tensor) -> Dispatch:
    return Dispatch(layer, 9, x_UD, np.zeros(1, np.int32), np.array([expert], np.int32), np.array([0, 1], np.int32))


def test_a_worker_computes_each_pair_with_its_own_layer_and_expert(reader: WeightReader):
    held = [(2, 7), (1, 3), (1, 7), (2, 0)]
    worker = make_worker(reader, held, slots=6)
    x = torch.randn(3, 56, generator=torch.Generator().manual_seed(0))
    for layer, experts in ((1, [3, 7]), (2, [0, 7])):
        message = Dispatch(
            layer, 1, x, np.array([2, 0, 1, 2], np.int32), np.array(experts, np.int32), np.array([0, 1, 4], np.int32)
        )
        expected = [
            expert_output(reader, layer, e, x[r])
            for e, r in zip([experts[0]] + [experts[1]] * 3, [2, 0, 1, 2], strict=True)
        ]
        torch.testing.assert_close(worker.compute(message), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_an_expert_that_is_not_held_is_named_and_not_computed(reader: WeightReader):
    worker = make_worker(reader, [(1, 0), (1, 5), (2, 4)])
    message = Dispatch(
        1,
        17,
        torch.zeros(1, 56),
        np.zeros(3, np.int32),
        np.array([0, 3, 4], np.int32),
        np.array([0, 1, 2, 3], np.int32),
    )
    with pytest.raises(ExpertNotHeldError, match=r"layer 1 experts \[3, 4\] are not held \(placement version 17\)"):
        worker.compute(message)
    with pytest.raises(ExpertNotHeldError, match=r"layer 2 experts \[0\]"):
        worker.compute(one_pair(2, 0, torch.zeros(1, 56)))


@pytest.mark.parametrize("layer, expert, told", [
    (-1, 0, r"layer -1 is not in 0 … 2"), (3, 0, "layer 3 is not in 0 … 2"), (1, -1, "expert -1 does not exist"),
    (1, 99, "expert 99 does not exist"),
])  # fmt: skip
def test_a_layer_or_an_expert_that_there_is_not_is_refused(reader: WeightReader, layer: int, expert: int, told: str):
    worker = make_worker(reader, [(1, 0), (1, 9), (2, 0)])
    with pytest.raises(IndexError, match=told):
        worker.compute(one_pair(layer, expert, torch.zeros(1, 56)))
    assert not worker.rows_served.any()


def test_loading_takes_slots_and_dropping_gives_them_back(reader: WeightReader):
    worker = make_worker(reader, [(1, 0), (1, 1)], slots=3)
    assert (worker.free_slots, worker.holds(1, 0), worker.holds(1, 1), worker.holds(2, 0)) == (1, True, True, False)
    bytes_of_one = 3 * 36 * 56 * 4
    assert worker.bank.nbytes == 2 * bytes_of_one
    worker.drop(1, 0)
    assert (worker.free_slots, worker.holds(1, 0), worker.bank.nbytes) == (2, False, bytes_of_one)
    with pytest.raises(ExpertNotHeldError, match="layer 1 expert 0 is not held"):
        worker.drop(1, 0)
    with pytest.raises(ExpertNotHeldError):
        worker.compute(one_pair(1, 0, torch.zeros(1, 56)))
    assert worker.free_slots == 2
    worker.load(reader, [(2, 9), (2, 8)])
    assert worker.free_slots == 0
    x = torch.randn(1, 56, generator=torch.Generator().manual_seed(1))
    for layer, expert in ((1, 1), (2, 8), (2, 9)):
        expected = expert_output(reader, layer, expert, x[0])
        torch.testing.assert_close(worker.compute(one_pair(layer, expert, x))[0], expected, rtol=1e-5, atol=1e-5)


def test_what_is_held_is_not_loaded_again(reader: WeightReader):
    worker = make_worker(reader, [(1, 0)], slots=2)
    before = reader.bytes_read
    worker.load(reader, [(1, 0), (1, 0)])
    assert (reader.bytes_read, worker.free_slots) == (before, 1)
    worker.load(reader, [(1, 1), (1, 1), (1, 0)])
    assert (reader.bytes_read - before, worker.free_slots) == (3 * 36 * 56 * 4, 0)


def test_loading_into_a_full_worker_keeps_what_was_loaded(reader: WeightReader):
    worker = ExpertWorker(reader.checkpoint.config, KERNELS, 1)
    with pytest.raises(RuntimeError, match="no free expert slot for layer 1 expert 1"):
        worker.load(reader, [(1, 0), (1, 1)])
    assert worker.holds(1, 0) and not worker.holds(1, 1)


def test_a_load_that_fails_gives_its_slot_back(reader: WeightReader, monkeypatch: pytest.MonkeyPatch):
    worker = ExpertWorker(reader.checkpoint.config, KERNELS, 1)
    with monkeypatch.context() as broken:
        broken.setattr(WeightReader, "expert", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            worker.load(reader, [(1, 0)])
    assert worker.free_slots == 1 and not worker.holds(1, 0)
    worker.load(reader, [(1, 0)])
    assert worker.holds(1, 0)


def test_progress_rises_to_one(reader: WeightReader):
    worker, seen = ExpertWorker(reader.checkpoint.config, KERNELS, 4), []
    worker.load(reader, [(1, e) for e in range(4)], seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_a_group_reads_only_its_own_experts(reader: WeightReader, monkeypatch: pytest.MonkeyPatch):
    names: list[str] = []
    original = WeightReader.tensor
    monkeypatch.setattr(WeightReader, "tensor", lambda self, name: names.append(name) or original(self, name))
    make_worker(reader, [(1, 4), (2, 5)])
    assert sorted(names) == sorted(
        f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight"
        for layer, e in [(1, 4), (2, 5)]
        for part in ("gate", "up", "down")
    )


def test_experts_can_come_and_go_while_others_are_computed(reader: WeightReader):
    worker = make_worker(reader, [(1, 0)], slots=3)
    x = torch.randn(4, 56, generator=torch.Generator().manual_seed(2))
    message = Dispatch(1, 1, x, np.arange(4, dtype=np.int32), np.array([0], np.int32), np.array([0, 4], np.int32))
    expected, stop, wrong = worker.compute(message), threading.Event(), []

    def compute() -> None:
        while not stop.is_set():
            if not torch.equal(worker.compute(message), expected):
                wrong.append(1)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for _ in range(60):
            worker.load(reader, [(1, 1), (2, 1)])
            worker.drop(1, 1)
            worker.drop(2, 1)
    finally:
        stop.set()
        thread.join()
    assert not wrong and worker.free_slots == 2


def test_weights_are_copies_and_no_views_of_the_file(tmp_path: Path):
    """A file that is replaced or cut after loading must not change an answer (or end the process with SIGBUS)."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, dtype="float32"))
    with WeightReader(checkpoint) as reader:
        worker = make_worker(reader, [(1, 0)])
    x = torch.randn(1, 56, generator=torch.Generator().manual_seed(3))
    before = worker.compute(one_pair(1, 0, x))
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as stream:
        stream.write(b"\x7f" * size)
    assert torch.equal(worker.compute(one_pair(1, 0, x)), before)


# --- the exchange ---------------------------------------------------------------------------------


def make_exchange(reader: WeightReader, placement: Placement) -> ExpertExchange:
    links = {name: InProcessLink(make_worker(reader, placement.held_by(name)).compute) for name in placement.groups()}
    return ExpertExchange(KERNELS, placement, links)


def placements() -> dict[str, Placement]:
    everywhere = tuple(("a", "b", "c") for _ in range(EXPERTS))
    ragged = tuple(("a", "b", "c")[e % 3 :][: 1 + e % 2] for e in range(EXPERTS))
    alone = tuple((f"g{e}",) for e in range(EXPERTS))
    return {
        "one": contiguous_placement(LAYERS, EXPERTS, ["a"]),
        "three": contiguous_placement(LAYERS, EXPERTS, ["a", "b", "c"]),
        "copies-everywhere": Placement(2, LAYERS, (everywhere, everywhere)),
        "ragged": Placement(3, LAYERS, (ragged, ragged[::-1])),
        "one-expert-a-group": Placement(4, LAYERS, (alone, alone)),
    }


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("name", placements())
def test_the_exchange_is_the_weighted_sum_whatever_the_placement(reader: WeightReader, name: str, rows: int):
    """Within rounding only, not bit for bit: torch's bmm picks its order of summation by the shape, and a placement
    changes the shapes. That outputs are added in the order of expert ids is tests/kernels/test_reference.py's subject.
    """
    exchange = make_exchange(reader, placements()[name])
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 56, generator=generator)
    weights = torch.rand(rows, 3, generator=generator)
    for layer in (*LAYERS, LAYERS[0]):  # a second time in another turn
        ids = torch.rand(rows, EXPERTS, generator=generator).topk(3).indices.sort(-1).values.to(torch.int32)
        dispatch(exchange, layer, x, ids, weights)
        expected = torch.stack(
            [
                sum(
                    (weights[t, j] * expert_output(reader, layer, int(ids[t, j]), x[t]) for j in range(3)),
                    torch.zeros(56),
                )
                for t in range(rows)
            ]
        )
        torch.testing.assert_close(exchange.combine(), expected, rtol=1e-5, atol=1e-5)


class RecordingLink(InProcessLink):
    """Answers each pair with numbers that tell who was asked what: no rounding, so that placement can be compared bit
    for bit."""

    def __init__(self) -> None:
        super().__init__(self.answer)
        self.messages: list[Dispatch] = []

    def answer(self, message: Dispatch) -> Tensor:
        self.messages.append(message)
        experts = torch.from_numpy(np.repeat(message.experts_A, np.diff(message.offsets_A1)))
        return message.x_UD[torch.from_numpy(message.rows_P).long()] * (1 + experts[:, None]) + message.layer


@pytest.mark.parametrize("name", placements())
def test_answers_reach_their_rows_bit_for_bit(name: str):
    placement = placements()[name]
    links = {group: RecordingLink() for group in placement.groups()}
    exchange = ExpertExchange(KERNELS, placement, links)
    x = torch.arange(1, 9, dtype=torch.float32)[:, None].expand(8, 56).contiguous()
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(8, EXPERTS, generator=generator).topk(4).indices.sort(-1).values.to(torch.int32)
    weights = torch.tensor([1.0, 256.0, 65536.0, 0.5]).expand(8, 4).contiguous()
    dispatch(exchange, 2, x, ids, weights)
    answers = x[:, None, 0] * (1 + ids) + 2
    assert torch.equal(exchange.combine(), (answers * weights).sum(-1, keepdim=True).expand(-1, 56))
    sent = [m for link in links.values() for m in link.messages]
    assert {(m.layer, m.placement_version) for m in sent} == {(2, placement.version)}
    assert all(len(m.x_UD) == len(set(m.rows_P.tolist())) for m in sent), "no row is sent that its group does not need"
    assert sum(len(m.rows_P) for m in sent) == 32


@pytest.mark.parametrize("copies", [2, 3])
def test_single_rows_go_to_every_copy_in_turn_in_every_layer(copies: int):
    """With two layers and two copies, one turn for all layers would send each layer's rows to the same copy for
    ever."""
    groups = tuple("abc"[:copies])
    links = {group: RecordingLink() for group in groups}
    exchange = ExpertExchange(KERNELS, Placement(1, LAYERS, tuple((groups,) * EXPERTS for _ in LAYERS)), links)
    for _ in range(2 * copies):
        for layer in LAYERS:
            dispatch(exchange, layer, torch.ones(1, 56), torch.tensor([[7]], dtype=torch.int32), torch.ones(1, 1))
            exchange.combine()
    for link in links.values():
        assert Counter(m.layer for m in link.messages) == dict.fromkeys(LAYERS, 2)


def test_a_new_placement_counts_from_the_next_dispatch(reader: WeightReader):
    old, new = (
        contiguous_placement(LAYERS, EXPERTS, ["a"]),
        contiguous_placement(LAYERS, EXPERTS, ["b", "c"], version=2),
    )
    links = {group: RecordingLink() for group in "abc"}
    exchange = ExpertExchange(KERNELS, old, links)
    x, ids, weights = torch.ones(2, 56), torch.tensor([[0, 11], [1, 2]], dtype=torch.int32), torch.ones(2, 2)
    dispatch(exchange, 1, x, ids, weights)
    exchange.combine()
    exchange.adopt(new, links)
    dispatch(exchange, 1, x, ids, weights)
    exchange.combine()
    assert [[m.placement_version for m in links[g].messages] for g in "abc"] == [[1], [2], [2]]
    assert exchange.placement is new


def test_rows_reads_and_the_time_spent_waiting_are_counted():
    class SlowLink(RecordingLink):
        def receive(self, progress: Callable[[], None] = lambda: None) -> Tensor:
            time.sleep(0.02)
            return super().receive()

    exchange = ExpertExchange(
        KERNELS, contiguous_placement(LAYERS, EXPERTS, ["a", "b"]), {"a": RecordingLink(), "b": SlowLink()}
    )
    for _ in range(2):
        dispatch(exchange, 2, torch.ones(2, 56), torch.tensor([[0, 11], [0, 2]], dtype=torch.int32), torch.ones(2, 2))
        exchange.combine()
    row = LAYERS.index(2)
    assert [exchange.rows_routed[row, e] for e in (0, 2, 11)] == [4, 2, 2] and exchange.rows_routed.sum() == 8
    assert [exchange.reads[row, e] for e in (0, 2, 11)] == [2, 2, 2] and exchange.reads.sum() == 6
    assert exchange.waited["b"] >= 0.04 > exchange.waited["a"] >= 0


def test_a_placement_with_unknown_groups_is_refused():
    with pytest.raises(ValueError, match=r"placement version 1 names groups \['b'\] that this shard has no link to"):
        ExpertExchange(KERNELS, contiguous_placement(LAYERS, EXPERTS, ["a", "b"]), {"a": RecordingLink()})


def test_a_worker_with_another_placement_says_so(reader: WeightReader):
    """The shard believes that group a holds everything; it holds layer 1 only."""
    worker = make_worker(reader, [(1, e) for e in range(EXPERTS)])
    exchange = ExpertExchange(
        KERNELS, contiguous_placement(LAYERS, EXPERTS, ["a"], version=8), {"a": InProcessLink(worker.compute)}
    )
    x, ids, weights = torch.ones(1, 56), torch.tensor([[4, 6]], dtype=torch.int32), torch.ones(1, 2)
    dispatch(exchange, 1, x, ids, weights)
    exchange.combine()
    with pytest.raises(ExpertNotHeldError, match=r"layer 2 experts \[4, 6\] are not held \(placement version 8\)"):
        dispatch(exchange, 2, x, ids, weights)
        exchange.combine()


# --- links that fail ------------------------------------------------------------------------------


class FragileLink(RecordingLink):
    """Fails as it is told to. An answer that was not taken when the next message is sent is an error, as over a real
    link."""

    def __init__(self) -> None:
        super().__init__()
        self.send_error: Exception | None = None
        self.receive_error: Exception | None = None
        self.on_receive: Callable[[Callable[[], None]], None] = lambda progress: None
        self.open = False  # an answer is under way

    def send(self, message: Dispatch) -> None:
        assert not self.open, "an answer is still under way"
        if self.send_error is not None:
            raise self.send_error
        self.open = True
        super().send(message)

    def receive(self, progress: Callable[[], None] = lambda: None) -> Tensor:
        assert self.open, "nothing was sent"
        self.open = False
        self.on_receive(progress)
        if self.receive_error is not None:
            raise self.receive_error
        return super().receive()


class Broken:
    """An exchange over fragile links, and what it tells of them."""

    def __init__(self, placement: Placement, patience: float = 5.0):
        self.links = {group: FragileLink() for group in placement.groups()}
        self.told: list[tuple[str, str]] = []
        self.on_failure: Callable[[str], None] = lambda group: None
        self.exchange = ExpertExchange(KERNELS, placement, self.links, patience=patience, link_failed=self._tell)

    def _tell(self, group: str, link: Any, reason: str) -> None:
        self.told.append((group, reason))
        self.on_failure(group)

    def layer(self, layer: int = 1) -> Tensor:
        x = torch.arange(1, 3, dtype=torch.float32)[:, None].expand(2, 56).contiguous()
        ids = torch.tensor([[0, 11], [1, 10]], dtype=torch.int32)
        dispatch(self.exchange, layer, x, ids, torch.ones(2, 2))
        return self.exchange.combine()[:, 0]

    def relink(self, group: str) -> FragileLink:
        link = FragileLink()
        self.exchange.relink(group, link)
        return link


TWO = contiguous_placement(LAYERS, EXPERTS, ["a", "b"])
RIGHT = torch.tensor([1.0 * (1 + 12) + 2, 2.0 * (2 + 11) + 2])


@pytest.mark.parametrize("when", ["send_error", "receive_error"])
def test_a_link_that_fails_is_told_once_and_the_layer_waits_for_another(when: str):
    broken = Broken(TWO)
    setattr(broken.links["b"], when, LinkError("connection reset"))
    fresh = []
    broken.on_failure = lambda group: threading.Timer(0.1, lambda: fresh.append(broken.relink(group))).start()
    assert torch.equal(broken.layer(), RIGHT)
    assert torch.equal(broken.layer(), RIGHT)
    assert broken.told == [("b", "connection reset")] and len(fresh[0].messages) == 2
    assert len(broken.links["a"].messages) == 2, "what was answered is not computed again"


def test_rows_go_to_another_copy_while_a_link_is_made_anew():
    everywhere = tuple(("a", "b") for _ in range(EXPERTS))
    broken = Broken(Placement(1, LAYERS, (everywhere, everywhere)))
    broken.links["b"].receive_error = LinkError("timed out")
    for _ in range(3):
        assert torch.equal(broken.layer(), RIGHT)
    assert broken.told == [("b", "timed out")]
    fresh = broken.relink("b")
    for _ in range(2):
        assert torch.equal(broken.layer(), RIGHT)
    assert fresh.messages, "the new link is used"


def test_experts_that_are_expected_are_waited_for():
    """A group that takes a lost one's place loads for longer than a layer waits where nothing is said."""
    broken = Broken(TWO, patience=0.3)
    broken.links["b"].receive_error = LinkError("timed out")

    def load(group: str) -> None:
        for _ in range(8):
            time.sleep(0.1)
            broken.exchange.offers.expect()
        broken.relink(group)

    broken.on_failure = lambda group: threading.Thread(target=load, args=(group,)).start()
    assert torch.equal(broken.layer(), RIGHT)


def test_a_new_placement_does_not_make_a_failed_link_whole():
    broken = Broken(TWO, patience=0.2)
    broken.links["b"].receive_error = LinkError("timed out")
    with pytest.raises(ExpertsLostError):
        broken.layer()
    broken.exchange.adopt(contiguous_placement(LAYERS, EXPERTS, ["a", "b"], version=2), broken.links)
    with pytest.raises(ExpertsLostError):
        broken.layer()
    assert broken.told == [("b", "timed out")]


def test_a_link_that_comes_with_an_offered_placement_is_the_newer_one():
    broken = Broken(TWO)
    adopted = []
    broken.exchange.offer(
        contiguous_placement(LAYERS, EXPERTS, ["a", "b"], version=2), broken.links, lambda: adopted.append(True)
    )
    fresh = broken.relink("b")
    assert torch.equal(broken.layer(), RIGHT)
    assert adopted == [True] and len(fresh.messages) == 1 and not broken.links["b"].messages


def test_answers_under_way_are_taken_when_a_layer_is_given_up():
    broken = Broken(TWO)
    x, ids = torch.ones(1, 56), torch.tensor([[0, 11]], dtype=torch.int32)
    dispatch(broken.exchange, 1, x, ids, torch.ones(1, 2))
    broken.exchange.abandon()  # the shared experts could not be computed, say
    assert torch.equal(broken.layer(2), RIGHT + 2)
    broken.exchange.abandon()  # nothing is under way
    assert broken.told == []


@pytest.mark.parametrize("given_up", [False, True])
def test_a_wait_begins_anew_with_each_part_of_an_answer(given_up: bool):
    """Else a shard on a slow line would be taken for one that hangs: each part may take as long as a group may be
    silent."""
    broken = Broken(TWO)
    waits: list[tuple[str, float, float]] = []  # for whom, for how long, and how long it took in truth

    def in_parts(progress: Callable[[], None]) -> None:
        for _ in range(3):
            begin = time.monotonic()
            progress()
            time.sleep(0.05)
            waits.append((*broken.exchange.pulse.waited(), time.monotonic() - begin))

    broken.links["b"].on_receive = in_parts
    dispatch(broken.exchange, 1, torch.ones(1, 56), torch.tensor([[0, 11]], dtype=torch.int32), torch.ones(1, 2))
    broken.exchange.abandon() if given_up else broken.exchange.combine()
    assert [whom for whom, _, _ in waits] == ["b"] * 3
    assert all(0.05 <= seconds <= took for _, seconds, took in waits)
    assert broken.exchange.pulse.waited() == ("", 0.0)


def test_a_link_that_fails_while_a_layer_is_given_up_is_told():
    broken = Broken(TWO)
    dispatch(broken.exchange, 1, torch.ones(1, 56), torch.tensor([[0, 11]], dtype=torch.int32), torch.ones(1, 2))
    broken.links["a"].receive_error, broken.links["b"].receive_error = ExpertNotHeldError("no"), LinkError("reset")
    broken.exchange.abandon()
    assert broken.told == [("b", "reset")]


def test_a_group_that_fails_is_mended_and_asked_again():
    broken = Broken(TWO)
    broken.links["b"].receive_error = GroupFailedError("the group failed: RuntimeError: device lost")
    broken.on_failure = lambda group: broken.relink(group) and None
    assert torch.equal(broken.layer(), RIGHT)
    assert broken.told == [("b", "the group failed: RuntimeError: device lost")]


def test_rows_at_which_every_group_fails_are_to_blame():
    broken = Broken(TWO)
    broken.links["b"].receive_error = GroupFailedError("the group failed: ValueError")

    def relink(group: str) -> None:
        broken.relink(group).receive_error = GroupFailedError("the group failed: ValueError")

    broken.on_failure = relink
    with pytest.raises(ExpertsFailedError, match="layer 1: b failed: the group failed: ValueError"):
        broken.layer()
    assert len(broken.told) == 2


def test_nobody_is_mended_while_a_faulty_request_is_looked_for():
    broken = Broken(TWO)
    broken.links["b"].receive_error = GroupFailedError("the group failed: ValueError")
    broken.exchange.finding_fault = True
    with pytest.raises(ExpertsFailedError):
        broken.layer()
    broken.exchange.abandon()
    broken.links["b"].receive_error = None
    assert torch.equal(broken.layer(), RIGHT) and broken.told == []


def test_groups_that_answer_that_they_failed_keep_their_links_while_a_faulty_request_is_looked_for():
    """Both fail at its rows: else each halving of the batch would count against a group that is well."""
    broken = Broken(TWO)
    for link in broken.links.values():
        link.receive_error = GroupFailedError("the group failed: ValueError")
    broken.exchange.finding_fault = True
    with pytest.raises(ExpertsFailedError):
        broken.layer()
    broken.exchange.abandon()
    for link in broken.links.values():
        link.receive_error = None
    assert torch.equal(broken.layer(), RIGHT) and broken.told == []


def test_only_groups_of_the_placement_have_their_waiting_remembered():
    exchange = ExpertExchange(KERNELS, TWO, {g: RecordingLink() for g in "abcd"})
    exchange.adopt(contiguous_placement(LAYERS, EXPERTS, ["c", "d"], version=2), {g: RecordingLink() for g in "abcd"})
    assert set(exchange.waited) == {"c", "d"}


def test_fp8_experts_are_dequantised_block_by_block(tmp_path: Path):
    from deepseek_checkpoints import dequantise

    overrides = {"hidden_size": 130, "moe_intermediate_size": 150}
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, overrides, fp8=True))
    tensors = make_tensors(json_config(tmp_path), fp8=True)
    with WeightReader(checkpoint) as reader:
        worker = make_worker(reader, [(2, 5)])
    x = torch.randn(1, 130, generator=torch.Generator().manual_seed(0))
    p = "model.layers.2.mlp.experts.5"
    gate, up, down = (
        dequantise(tensors[f"{p}.{n}_proj.weight"], tensors[f"{p}.{n}_proj.weight_scale_inv"])
        for n in ("gate", "up", "down")
    )
    expected = down @ (torch.nn.functional.silu(gate @ x[0]) * (up @ x[0]))
    torch.testing.assert_close(worker.compute(one_pair(2, 5, x))[0], expected, rtol=1e-5, atol=1e-5)


def json_config(path: Path) -> dict:
    import json

    return json.loads((path / "config.json").read_text())
