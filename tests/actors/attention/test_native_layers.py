"""All layers of a step in one native call, with experts elsewhere, give the tokens of layers in Python, and what is
unusual is done there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from link_peers import Group, connect, make_worker
from native_there import require_native
from waiting import until

from isotherm.actors.attention import native_exchange
from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.exchange import ExpertExchange
from isotherm.actors.attention.native_exchange import NativeLayers
from isotherm.actors.local import run
from isotherm.actors.models.registry import load_model
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import Delta, GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.placement.table import Placement
from isotherm.kernels.native.backend import NativeKernels

require_native(ring=True)

CONFIG = SchedulerConfig(block_size=4, blocks=64, max_batch_tokens=32, max_sequences=16, max_model_len=128)
REQUESTS = [
    GenerationRequest(f"r{i}", tuple(range(3 + i, 9 + 2 * i)), SamplingParams(10, temperature=1.0, seed=i, logprobs=2))
    for i in range(5)
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), dtype="float32")


@dataclass
class Calls:
    """Of NativeLayers, in turn: how far a call for several layers has come, or the layer that was alone."""

    advanced: list[Any] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made, advance, moe = Calls(), NativeLayers.advance, NativeLayers.moe

    def advanced(self: NativeLayers, *arguments: Any) -> Any:
        made.advanced.append(advance(self, *arguments))
        return made.advanced[-1]

    def alone(self: NativeLayers, layer: int, *arguments: Any) -> Any:
        made.alone.append(layer)
        return moe(self, layer, *arguments)

    monkeypatch.setattr(NativeLayers, "advance", advanced)
    monkeypatch.setattr(NativeLayers, "moe", alone)
    return made


class Served:
    """An engine whose experts are at two groups, both of which hold all of them."""

    def __init__(self, path: Path, native: bool = True):
        checkpoint = Checkpoint.open(path)
        self.moe_layers = checkpoint.config.moe_layers
        self.experts = checkpoint.config.n_routed_experts
        self.groups = {name: Group(make_worker(path, True), True) for name in "ab"}
        self.links = {name: connect(group, timeout=20.0) for name, group in self.groups.items()}
        self.told: list[str] = []
        kernels = NativeKernels(torch.float32, 2)
        self.exchange = ExpertExchange(
            kernels,
            self.placed(1, "a", "b"),
            self.links,
            link_failed=lambda group, link, why: self.told.append(group),
            hidden=checkpoint.config.hidden_size,
        )
        if not native:
            self.exchange._native = None
        with WeightReader(checkpoint) as reader:
            model = load_model(checkpoint.config, kernels, reader, CONFIG.max_model_len)
        self.engine = Engine(model, self.exchange, CONFIG)

    def placed(self, version: int, *groups: str) -> Placement:
        return Placement(
            version, self.moe_layers, tuple(tuple(groups for _ in range(self.experts)) for _ in self.moe_layers)
        )

    def said(self) -> list[Delta]:
        return sorted(run(self.engine, REQUESTS), key=lambda delta: (delta.request_id, delta.start))

    def close(self) -> None:
        for link in self.links.values():
            link.close()
        for group in self.groups.values():
            group.close()


@pytest.fixture
def served(path: Path) -> Iterator[Served]:
    made = Served(path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(path: Path) -> list[Delta]:
    """By layers in Python."""
    plain = Served(path, native=False)
    try:
        return plain.said()
    finally:
        plain.close()


def test_a_step_is_one_call(path: Path, served: Served, expected: list[Delta], calls: Calls):
    assert served.said() == expected
    done = served.engine.steps
    # Only where a message needs more room than its segment has does a layer go through Python.
    assert done <= len(calls.advanced) < done + 10 and len(calls.alone) < 10
    plain = Served(path, native=False)
    plain.said()
    assert (served.exchange.rows_routed == plain.exchange.rows_routed).all()
    assert (served.exchange.reads == plain.exchange.reads).all()
    assert served.exchange._turns == plain.exchange._turns
    plain.close()
    assert served.exchange.waited_seconds > 0 and served.exchange.pulse._waits.longest > 0


def test_a_call_ends_where_its_time_is_over(
    served: Served, expected: list[Delta], calls: Calls, monkeypatch: pytest.MonkeyPatch
):
    """So that the thread gives signs of life, however slow layers are."""
    monkeypatch.setattr(native_exchange, "BUDGET", 0.0)
    before = served.exchange.pulse.beats
    assert served.said() == expected
    layers = len(served.moe_layers)
    assert calls.alone == list(served.moe_layers) * served.engine.steps
    assert served.exchange.pulse.beats >= before + layers * served.engine.steps


def test_a_placement_that_is_offered_is_in_force_within_the_step(served: Served, expected: list[Delta], calls: Calls):
    adopted = threading.Event()
    served.exchange.offer(served.placed(9, "b"), {"b": served.links["b"]}, adopted.set)
    assert served.said() == expected and adopted.is_set()
    assert calls.alone[0] == served.moe_layers[0], "the first layer asked what is wanted"
    assert served.groups["a"].worker.rows_served.sum() == 0


def test_who_asks_in_mid_step_is_answered_within_it(served: Served, calls: Calls):
    said: list[bool] = []
    served.engine.scheduler.add(REQUESTS[0])
    served.engine.step()
    served.exchange.questions.ask(said.append)
    served.engine.step()
    assert said == [True] and len(calls.alone) >= 1 and not served.exchange.questions.waiting
    alone = len(calls.alone)
    served.engine.step()
    assert len(calls.alone) == alone, "nobody is wanted any more"


def test_a_group_that_is_late_is_waited_for_in_python(served: Served, expected: list[Delta], calls: Calls):
    gate = served.groups["b"].worker.gate
    assert gate is not None
    done: list[list[Delta]] = []
    with gate:
        thread = threading.Thread(target=lambda: done.append(served.said()))
        thread.start()
        until(lambda: served.exchange.pulse.waits_for == "b" and calls.advanced and calls.advanced[-1].unfinished)
        assert thread.is_alive() and served.exchange.pulse.waits_for == "b"
        late = calls.advanced[-1]
        assert late.unfinished is not None and any(late.unfinished.pairs_sent)
    thread.join(20)
    assert done == [expected] and served.told == []


def test_a_link_that_is_closed_between_two_steps(served: Served, expected: list[Delta]):
    engine = served.engine
    for request in REQUESTS:
        engine.scheduler.add(request)
    deltas = engine.step() + engine.step()
    served.links["a"].close()
    while len(engine.scheduler):
        deltas += engine.step()
    assert sorted(deltas, key=lambda delta: (delta.request_id, delta.start)) == expected and served.told == ["a"]


def test_experts_that_a_group_does_not_hold(served: Served, expected: list[Delta]):
    for layer in served.moe_layers:
        for expert in range(served.experts):
            served.groups["a"].worker.drop(layer, expert)
    assert served.said() == expected and served.told == ["a"]
