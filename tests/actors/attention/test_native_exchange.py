"""A layer in one native call gives the bits of the exchange in Python, and what fails in it is taken up there."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from faults import stop
from link_peers import Group, connect, make_worker, process, serve_group
from native_there import require_native
from torch import Tensor
from waiting import until

from isotherm.actors.attention.exchange import ExpertExchange
from isotherm.actors.attention.lost_experts import ExpertsLostError
from isotherm.actors.attention.native_exchange import NativeLayers, Unfinished
from isotherm.actors.links.shared_memory import SharedMemoryLink
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.placement.table import Placement, contiguous_placement
from isotherm.kernels.native.backend import NativeKernels
from isotherm.kernels.ops import LinearWeight, Router

require_native(ring=True)

EXPERTS, LAYERS, TOP_K = 12, (1, 2), 3
EVERYWHERE = tuple(("a", "b") for _ in range(EXPERTS))
RAGGED = tuple(("a", "b")[e % 2 :][: 1 + e % 3 // 2] for e in range(EXPERTS))
PLACEMENTS = {
    "one group": contiguous_placement(LAYERS, EXPERTS, ["a"]),
    "two groups": contiguous_placement(LAYERS, EXPERTS, ["a", "b"]),
    "copies everywhere": Placement(2, LAYERS, (EVERYWHERE, EVERYWHERE)),
    "ragged": Placement(3, LAYERS, (RAGGED, RAGGED[::-1])),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), dtype="float32")


@dataclass
class Layer:
    """What a model has of a MoE layer."""

    router: Router
    gate_up: LinearWeight
    down: LinearWeight


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    return NativeKernels(torch.float32, 1)


@pytest.fixture(scope="module")
def layers(path: Path, kernels: NativeKernels) -> dict[int, Layer]:
    checkpoint, made = Checkpoint.open(path), {}
    with WeightReader(checkpoint) as reader:
        for layer in LAYERS:
            p = f"model.layers.{layer}.mlp"
            gate, up, down = reader.mlp(f"{p}.shared_experts")
            made[layer] = Layer(
                Router(
                    weight=reader.tensor(f"{p}.gate.weight").float(),
                    bias=reader.tensor(f"{p}.gate.e_score_correction_bias").float(),
                    n_group=4,
                    topk_group=2,
                    top_k=TOP_K,
                    normalise=True,
                    scaling=2.5,
                ),
                kernels.pack_linear([gate, up]),
                kernels.pack_linear([down]),
            )
    return made


class Cluster:
    """Groups in this process with links in shared memory, and two exchanges over them: the one that is used, and one
    that goes through Python."""

    def __init__(self, path: Path, kernels: NativeKernels, placement: Placement, **exchange: Any):
        self.groups = {
            name: Group(make_worker(path, True, held=sorted(placement.held_by(name))), True)
            for name in placement.groups()
        }
        self.links = {name: connect(group, timeout=20.0) for name, group in self.groups.items()}
        self.fast, self.plain = (ExpertExchange(kernels, placement, self.links, **exchange) for _ in range(2))
        self.plain._native = None

    def close(self) -> None:
        for link in self.links.values():
            link.close()
        for group in self.groups.values():
            group.close()


def inputs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + rows)
    return torch.randn(rows, 56, generator=generator), torch.randn(rows, 56, generator=generator)


def moe(
    exchange: ExpertExchange, number: int, layer: Layer, x: Tensor, residual: Tensor, shared: bool = True
) -> Tensor:
    own = (layer.gate_up, layer.down) if shared else (None, None)
    return exchange.moe(number, x, layer.router, *own, residual)


@pytest.fixture(params=PLACEMENTS)
def cluster(request: pytest.FixtureRequest, path: Path, kernels: NativeKernels) -> Iterator[Cluster]:
    made = Cluster(path, kernels, PLACEMENTS[request.param])
    yield made
    made.close()


@pytest.fixture
def two(path: Path, kernels: NativeKernels) -> Iterator[Cluster]:
    made = Cluster(path, kernels, PLACEMENTS["copies everywhere"])
    yield made
    made.close()


def test_bits_and_counters_are_those_of_the_exchange_in_python(cluster: Cluster, layers: dict[int, Layer]):
    assert cluster.fast._native is not None
    for turn, rows in enumerate([1, 2, 16, 33, 5, 1, 70]):
        for number, layer in layers.items():
            x, residual = inputs(rows, turn)
            there = [moe(e, number, layer, x, residual, turn % 3 > 0) for e in (cluster.fast, cluster.plain)]
            assert torch.equal(*there)
    assert (cluster.fast.rows_routed == cluster.plain.rows_routed).all() and cluster.fast.rows_routed.sum() > 0
    assert (cluster.fast.reads == cluster.plain.reads).all()
    served = [group.worker.rows_served.sum() for group in cluster.groups.values()]
    assert sum(served) == 2 * cluster.fast.rows_routed.sum()  # half of them came from each exchange
    assert cluster.fast.waited_seconds > 0 and set(cluster.fast.waited) == set(cluster.groups)
    assert sum(cluster.fast.waited.values()) == pytest.approx(cluster.fast.waited_seconds)


def test_every_copy_takes_the_rows_that_are_its_turn(two: Cluster, layers: dict[int, Layer]):
    for seed in range(8):
        x, residual = inputs(3, seed)
        before = {name: group.worker.rows_served.copy() for name, group in two.groups.items()}
        moe(two.fast, 1, layers[1], x, residual)
        middle = {name: group.worker.rows_served.copy() for name, group in two.groups.items()}
        moe(two.plain, 1, layers[1], x, residual)
        for name, group in two.groups.items():
            assert (middle[name] - before[name] == group.worker.rows_served - middle[name]).all()


def test_rows_that_lie_apart_are_sent_as_they_are(two: Cluster, layers: dict[int, Layer]):
    wide, residual = torch.randn(9, 100, generator=torch.Generator().manual_seed(3)), inputs(9)[1]
    x = wide[:, 20:76]
    assert not x.is_contiguous()
    there = moe(two.fast, 1, layers[1], x, residual)
    assert torch.equal(there, moe(two.plain, 1, layers[1], x.contiguous(), residual))


def test_a_message_that_a_segment_cannot_hold_has_it_grown(two: Cluster, layers: dict[int, Layer]):
    x, residual = inputs(900)
    for _ in range(2):  # the second time it fits
        assert torch.equal(*(moe(e, 2, layers[2], x, residual) for e in (two.fast, two.plain)))
    native, router = two.fast._native, layers[2].router
    assert native is not None
    assert isinstance(native.moe(2, x, router, (None, None), residual, 1), Tensor)
    two.fast.abandon()


def test_an_answer_that_comes_late_is_waited_for(
    two: Cluster, layers: dict[int, Layer], monkeypatch: pytest.MonkeyPatch
):
    x, residual = inputs(7)
    expected = moe(two.plain, 1, layers[1], x, residual)
    unfinished: list[object] = []
    original = NativeLayers.moe

    def watched(self: NativeLayers, *arguments: Any) -> Tensor | Unfinished:
        done = original(self, *arguments)
        unfinished.append(done if isinstance(done, Unfinished) else None)
        return done

    monkeypatch.setattr(NativeLayers, "moe", watched)
    gate = two.groups["b"].worker.gate
    assert gate is not None
    two.fast._turns.clear()
    two.plain._turns.clear()
    with gate:
        done: list[Tensor] = []
        thread = threading.Thread(target=lambda: done.append(moe(two.fast, 1, layers[1], x, residual)))
        thread.start()
        until(lambda: two.fast.pulse.waits_for == "b")  # the thread says for whom it waits
        assert thread.is_alive()
    thread.join(10)
    assert torch.equal(done[0], expected)
    (only,) = unfinished
    assert isinstance(only, Unfinished) and all(only.pairs_sent)
    assert 0.2 < two.fast.waited["b"] < 5 and two.fast.waited["a"] < 0.2


def test_a_link_that_is_closed_meanwhile_is_not_touched(two: Cluster, layers: dict[int, Layer]):
    told: list[str] = []
    two.fast._link_failed = lambda group, link, why: told.append(f"{group}: {why}")
    x, residual = inputs(5)
    expected = moe(two.plain, 1, layers[1], x, residual)
    two.links["a"].close()
    assert torch.equal(moe(two.fast, 1, layers[1], x, residual), expected), "the copies of b are used"
    assert told == ["a: this link was closed"] and set(two.fast._failed) == {"a"}
    assert torch.equal(moe(two.fast, 1, layers[1], x, residual), expected), "and from then on"
    fresh = connect(two.groups["a"], "again")
    two.links["a"] = fresh
    two.fast.relink("a", fresh)
    assert torch.equal(moe(two.fast, 1, layers[1], x, residual), expected)
    assert not two.fast._failed and two.fast._native is not None


def placed(version: int, *groups: str) -> Placement:
    return Placement(version, LAYERS, tuple(tuple(groups for _ in range(EXPERTS)) for _ in LAYERS))


def test_a_failed_link_that_no_placement_needs_is_in_nobodys_way(
    two: Cluster, layers: dict[int, Layer], monkeypatch: pytest.MonkeyPatch
):
    """A group dies, and a placement without it is adopted before the shard is told to let go of the link."""
    native: list[int] = []
    original = NativeLayers.moe

    def counted(self: NativeLayers, *arguments: Any) -> Tensor | Unfinished:
        native.append(self._version)
        return original(self, *arguments)

    monkeypatch.setattr(NativeLayers, "moe", counted)
    told: list[str] = []
    two.fast._link_failed = lambda group, link, why: told.append(group)
    x, residual = inputs(5)
    expected = moe(two.plain, 1, layers[1], x, residual)
    two.links["b"].close()
    assert torch.equal(moe(two.fast, 1, layers[1], x, residual), expected) and told == ["b"]
    assert torch.equal(moe(two.fast, 1, layers[1], x, residual), expected) and len(native) == 1
    two.fast.offer(placed(8, "a"), two.links, lambda: None)
    assert torch.equal(moe(two.fast, 1, layers[1], x, residual), expected)
    assert native[1:] == [8]
    two.fast.offer(placed(9, "a", "b"), two.links, lambda: None)
    assert torch.equal(moe(two.fast, 1, layers[1], x, residual), expected)
    assert native[1:] == [8] and told == ["b"], "where it is named again, its failed link is not used for that"


def test_a_group_that_refuses_is_left_to_the_exchange(two: Cluster, layers: dict[int, Layer]):
    told: list[str] = []
    two.fast._link_failed = lambda group, link, why: told.append(f"{group}: {why}")
    x, residual = inputs(40)
    expected = moe(two.plain, 1, layers[1], x, residual)
    for expert in range(EXPERTS):
        two.groups["b"].worker.drop(1, expert)
    assert torch.equal(moe(two.fast, 1, layers[1], x, residual), expected)
    assert len(told) == 1 and "are not held" in told[0]


def test_a_group_that_dies_in_mid_layer(path: Path, kernels: NativeKernels, layers: dict[int, Layer]):
    """Stopped first, so that its answer is under way for certain when it dies."""
    name, told = "native-exchange-dies", []
    placement = PLACEMENTS["copies everywhere"]
    here = Group(make_worker(path, True), True)
    with process(serve_group, path, name, True) as pid:
        links = {"a": connect(here), "b": SharedMemoryLink.open(name, 1 << 16, 20.0, 20.0)}
        exchange = ExpertExchange(kernels, placement, links, link_failed=lambda *what: told.append(what[0]))
        plain = ExpertExchange(kernels, placement, links)
        plain._native = None
        x, residual = inputs(6)
        expected = moe(plain, 1, layers[1], x, residual)
        stop(pid)
        threading.Timer(0.05, os.kill, (pid, signal.SIGKILL)).start()
        began = time.monotonic()
        assert torch.equal(moe(exchange, 1, layers[1], x, residual), expected)
        assert told == ["b"] and time.monotonic() - began < 5
        for link in links.values():
            link.close()
    here.close()


def test_a_new_placement_is_in_force_from_the_next_layer_on(
    path: Path, kernels: NativeKernels, layers: dict[int, Layer]
):
    cluster = Cluster(path, kernels, PLACEMENTS["copies everywhere"])
    x, residual = inputs(4)
    expected = moe(cluster.plain, 1, layers[1], x, residual)
    assert torch.equal(moe(cluster.fast, 1, layers[1], x, residual), expected)
    only_b = Placement(9, LAYERS, tuple(tuple(("b",) for _ in range(EXPERTS)) for _ in LAYERS))
    adopted = threading.Event()
    cluster.fast.offer(only_b, {"b": cluster.links["b"]}, adopted.set)
    before = cluster.groups["a"].worker.rows_served.sum()
    assert torch.equal(moe(cluster.fast, 1, layers[1], x, residual), expected)
    assert adopted.is_set() and cluster.groups["a"].worker.rows_served.sum() == before
    cluster.close()


def test_experts_that_nobody_can_compute_are_said_so(two: Cluster, layers: dict[int, Layer]):
    two.fast.patience, two.fast._link_failed = 0.1, lambda *_: None
    for link in two.links.values():
        link.close()
    with pytest.raises(ExpertsLostError, match="no group that can be reached holds experts"):
        moe(two.fast, 1, layers[1], *inputs(2))


def test_wrong_shapes_are_refused_before_they_are_read(two: Cluster, layers: dict[int, Layer]):
    x, residual = inputs(3)
    for wrong in ((x[:, :-1], residual), (x, residual[:-1]), (x.double(), residual), (x, residual.bfloat16())):
        with pytest.raises(ValueError, match="is needed"):
            moe(two.fast, 1, layers[1], *wrong)
    assert not two.fast._under_way
    assert np.all(two.fast.rows_routed == 0)
