"""Links in shared memory: the same bits as a function call, and a survivor that notices at once whatever the other side
dies of."""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from exchange_parts import dispatch
from link_peers import Group, ask, connect, make_worker, random_message
from native_there import require_native
from programs import running
from shared_memory import files, segments, still_there
from torch import Tensor
from waiting import until

from isotherm.actors.attention.exchange import ExpertExchange
from isotherm.actors.experts.native_loop import NativeLoop
from isotherm.actors.links.in_process import InProcessLink
from isotherm.actors.links.protocol import Dispatch, ExpertNotHeldError, LinkError
from isotherm.actors.links.shared_memory import SharedMemoryLink, segment_bytes
from isotherm.actors.models.weights import WeightReader
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.placement.table import contiguous_placement

pytestmark = pytest.mark.slow

require_native(ring=True)

SEED = int(os.environ.get("ISOTHERM_TEST_SEED", "20261122"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), dtype="float32")


@pytest.fixture(scope="module")
def config(path: Path):
    return Checkpoint.open(path).config


@pytest.fixture(params=["native loop", "python server"])
def group(request: pytest.FixtureRequest, path: Path) -> Iterator[Group]:
    native = request.param == "native loop"
    made = Group(make_worker(path, native), native)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_segment_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    before = segments()
    yield
    for record in caplog.get_records("call"):
        record.exc_info = record.args = None  # the frames of an error's traceback keep their links
    gc.collect()
    until(lambda: len(segments()) <= len(before), 30.0)


STRANGER = """
import os, sys, time
anonymous, named = os.memfd_create("isotherm link"), open(sys.argv[1], "w")
print("here", flush=True)
time.sleep(60)
"""


def test_segments_and_files_are_those_of_the_process_that_is_looked_at(group: Group, tmp_path: Path):
    """Otherwise the check above would see nothing, or what others do meanwhile."""
    before, me = segments(), psutil.Process()
    link = connect(group)
    during = segments()
    assert len(during) > len(before) and {Path(name).name.split()[0] for name in during} == {"memfd:isotherm"}
    named = f"/dev/shm/isotherm-{uuid.uuid4().hex}"
    with running([sys.executable, "-c", STRANGER, named], os.environ) as stranger:
        try:
            assert stranger.stdout is not None and stranger.stdout.readline() == "here\n"
            assert segments() == during and segments(stranger.pid) == ["/memfd:isotherm link"]
            assert named not in files([me]) and files([psutil.Process(stranger.pid)]) == {named}
            assert still_there([named]) == [named]
        finally:
            Path(named).unlink(missing_ok=True)
    assert still_there([named]) == []
    link.close()


# --- what goes through ----------------------------------------------------------------------------


def test_outputs_are_those_of_a_function_call(group: Group, config):
    link, rng = connect(group), np.random.default_rng(0)
    served = np.zeros_like(group.worker.rows_served)
    for rows in [1, 2, 0, 7, 33, 1, 200, 0, 3]:
        message = random_message(config, rng, rows)
        before = group.worker.rows_served.copy()
        answer = ask(link, message).clone()
        served = group.worker.rows_served - before
        assert served.sum() == len(message.rows_P)
        assert (served[message.layer, message.experts_A] == np.diff(message.offsets_A1)).all()
        assert torch.equal(answer, group.worker.compute(message)), rows
    assert group.server.counts.messages == 9 and group.server.counts.refused == 0
    assert group.server.links() == {"shard": "shared-memory"}
    link.close()


def test_rows_may_lie_apart(group: Group, config):
    """A slice of a wider tensor, and one that needs a copy."""
    link, rng = connect(group), np.random.default_rng(1)
    message = random_message(config, rng, 6)
    wide = torch.randn(6, 3 * config.hidden_size)
    for x in (wide[:, config.hidden_size : 2 * config.hidden_size], wide[:, ::3]):
        given = Dispatch(message.layer, 1, x, message.rows_P, message.experts_A, message.offsets_A1)
        plain = Dispatch(message.layer, 1, x.contiguous(), message.rows_P, message.experts_A, message.offsets_A1)
        assert torch.equal(ask(link, given), group.worker.compute(plain))
    link.close()


def test_a_message_larger_than_the_segment_makes_it_grow(group: Group, config):
    """Views into the old mapping stay readable, and what was said about an answer's life still holds."""
    link, rng = connect(group, nbytes=segment_bytes(config.hidden_size, 4, 1, 1)), np.random.default_rng(2)
    small = random_message(config, rng, 1)
    view = ask(link, small)
    expected = view.clone()
    assert torch.equal(expected, group.worker.compute(small))
    for rows in (40, 41, 400, 3, 1000):
        message = random_message(config, rng, rows)
        assert torch.equal(ask(link, message), group.worker.compute(message))
        view.sum()
    assert len(link._end.map) > 1000 * config.hidden_size * 4
    link.close()
    view.sum()


def test_an_answer_stays_until_the_next_message(group: Group, config):
    link, rng = connect(group), np.random.default_rng(3)
    message = random_message(config, rng, 9)
    view = ask(link, message)
    time.sleep(0.02)
    assert torch.equal(view, group.worker.compute(message))
    link.close()


def test_the_exchange_over_shared_memory_is_the_exchange_in_one_process(path: Path, config):
    placement = contiguous_placement(config.moe_layers, config.n_routed_experts, ["a", "b", "c"])
    groups = {name: Group(make_worker(path, True, held=placement.held_by(name)), True) for name in placement.groups()}
    links = {name: connect(group) for name, group in groups.items()}
    kernels = groups["a"].worker.kernels
    here = ExpertExchange(
        kernels, placement, {name: InProcessLink(group.worker.compute) for name, group in groups.items()}
    )
    there = ExpertExchange(kernels, placement, links)
    generator = torch.Generator().manual_seed(4)
    for rows in (1, 5, 30):
        for layer in config.moe_layers:
            x, weights = (
                torch.randn(rows, config.hidden_size, generator=generator),
                torch.rand(rows, 3, generator=generator),
            )
            ids = (
                torch.rand(rows, config.n_routed_experts, generator=generator)
                .topk(3)
                .indices.sort(-1)
                .values.to(torch.int32)
            )
            there.begin_step()
            for exchange in (here, there):
                dispatch(exchange, layer, x, ids, weights)
            assert torch.equal(there.combine(), here.combine())
            there.end_step()
    for name, link in links.items():
        link.close()
        groups[name].close()


# --- refusals -------------------------------------------------------------------------------------


def one_pair(layer: int, expert: int, x: Tensor) -> Dispatch:
    return Dispatch(layer, 9, x, np.zeros(1, np.int32), np.array([expert], np.int32), np.array([0, 1], np.int32))


@pytest.mark.parametrize("native", [True, False])
def test_an_expert_that_is_not_held_is_named_and_the_link_goes_on(path: Path, config, native: bool):
    group = Group(make_worker(path, native, held=[(1, 0), (1, 5)]), native)
    link, x = connect(group), torch.ones(1, config.hidden_size)
    message = Dispatch(1, 17, x, np.zeros(3, np.int32), np.array([0, 3, 4], np.int32), np.array([0, 1, 2, 3], np.int32))
    for _ in range(2):
        with pytest.raises(ExpertNotHeldError, match=r"layer 1 experts \[3, 4\] are not held \(placement version 17\)"):
            ask(link, message)
        assert torch.equal(ask(link, one_pair(1, 5, x)), group.worker.compute(one_pair(1, 5, x)))
    assert group.server.counts.refused == 2
    link.close()
    group.close()


def test_messages_that_make_no_sense_are_refused(path: Path, config):
    group = Group(make_worker(path, True), True)
    x = torch.ones(2, config.hidden_size)
    numbers = np.array([0], np.int32)
    bad = [
        Dispatch(99, 1, x, numbers, numbers, np.array([0, 1], np.int32)),
        Dispatch(-1, 1, x, numbers, numbers, np.array([0, 1], np.int32)),
        Dispatch(1, 1, x, np.array([2], np.int32), numbers, np.array([0, 1], np.int32)),
        Dispatch(1, 1, x, numbers, numbers, np.array([0, 5], np.int32)),
        Dispatch(1, 1, x, numbers, np.array([400], np.int32), np.array([0, 1], np.int32)),
        Dispatch(1, 1, x[:, :8], numbers, numbers, np.array([0, 1], np.int32)),
    ]
    link = connect(group)
    for message in bad:
        with pytest.raises(LinkError, match="the group failed: "):
            ask(link, message)
    good = one_pair(1, 3, x)
    assert torch.equal(ask(link, good), group.worker.compute(good))
    link.close()
    group.close()


def test_experts_come_and_go_under_load(path: Path, config):
    """Each answer is right or says that the expert is not held; the others' answers are never touched."""
    group = Group(make_worker(path, True, held=[(1, 0)], slots=4), True)
    everything = make_worker(path, True)
    x = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(5))
    steady = one_pair(1, 0, x)
    coming = Dispatch(
        1, 1, x, np.arange(5, dtype=np.int32), np.array([0, 2, 3], np.int32), np.array([0, 1, 3, 5], np.int32)
    )
    expected = {id(m): everything.compute(m) for m in (steady, coming)}
    seen, wrong, stop = {"answered": 0, "refused": 0}, [], threading.Event()

    def shard(link: SharedMemoryLink, message: Dispatch) -> None:
        while not stop.is_set():
            try:
                same = torch.equal(ask(link, message), expected[id(message)])
                seen["answered"] += message is coming
                if not same:
                    wrong.append(message)
            except ExpertNotHeldError:
                seen["refused"] += 1
                if message is steady:
                    wrong.append(message)

    links = [connect(group, "steady"), connect(group, "coming")]
    threads = [threading.Thread(target=shard, args=pair) for pair in zip(links, (steady, coming), strict=True)]
    for thread in threads:
        thread.start()
    with WeightReader(Checkpoint.open(path)) as reader:
        for _ in range(60):
            group.worker.load(reader, [(1, 2), (1, 3), (2, 0)])
            time.sleep(0.002)
            for pair in ((1, 2), (1, 3), (2, 0)):
                group.worker.drop(*pair)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and seen["answered"] > 0 and seen["refused"] > 0, seen
    assert group.worker.free_slots == 3
    for link in links:
        link.close()
    group.close()


# --- several shards -------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0.0, 1.0, 50.0])
def test_shards_get_what_each_gets_alone(path: Path, config, window: float):
    """Four shards in any interleaving, all the while inside a step: messages are held and gathered, and nobody's bits
    change."""
    group = Group(make_worker(path, True), True, window)
    work = []
    for i in range(4):
        rng = np.random.default_rng([6, i])
        steps = [
            [random_message(config, rng, int(rng.integers(0, 12)), layer) for layer in config.moe_layers]
            for _ in range(25)
        ]
        work.append([message for step in steps for message in step])
    alone = [[group.worker.compute(message) for message in messages] for messages in work]
    before = group.worker.rows_served.copy()
    links = [connect(group, f"shard-{i}") for i in range(4)]
    wrong = []

    def run(i: int) -> None:
        pauses = random.Random(SEED + i)
        for message, expected in zip(work[i], alone[i], strict=True):
            links[i].in_step(True)
            if pauses.random() < 0.1:
                time.sleep(pauses.random() * 0.002)
            if not torch.equal(ask(links[i], message), expected):
                wrong.append((i, message.layer))
        links[i].in_step(False)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = group.server.counts
    assert not wrong and counts.messages == 4 * 25 * 2
    assert counts.gathered >= (
        60 if window > 1 else 0
    ) and counts.computations == counts.messages - counts.gathered + shared(counts)
    assert (counts.held_seconds > 0) == (window > 0)
    assert (group.worker.rows_served == 2 * before).all(), "both ways count every row of every expert"
    for link in links:
        link.close()
    group.close()


def shared(counts) -> int:
    """Computations that gathered messages shared."""
    return counts.computations - (counts.messages - counts.gathered)


def test_one_busy_shard_is_never_held(path: Path, config):
    """Also with others that are connected and idle, or that said they were inside a step and then fell silent."""
    group = Group(make_worker(path, True), True, window=50.0)
    busy, idle, silent = (connect(group, name) for name in ("busy", "idle", "silent"))
    rng = np.random.default_rng(7)
    ask(idle, random_message(config, rng, 2))
    silent.in_step(True)  # no message has come from it: nothing says when one will
    idle.in_step(False)
    for _ in range(50):
        busy.in_step(True)
        ask(busy, random_message(config, rng, 3))
    assert group.server.counts.held_seconds == 0
    group.close()


def test_a_shard_that_stalls_inside_a_step_delays_the_others_once(path: Path, config):
    group = Group(make_worker(path, True), True, window=1.0)
    links = [connect(group, f"shard-{i}") for i in range(2)]
    rng = np.random.default_rng(8)
    for layer in config.moe_layers:
        for link in links:
            link.in_step(True)
            link.send(random_message(config, rng, 3, layer))
        for link in links:
            link.receive()
    time.sleep(0.05)  # shard-1 hangs inside its step; its silence is longer than any window by now
    before = group.server.counts.held_seconds
    for _ in range(20):
        ask(links[0], random_message(config, rng, 3))
    assert group.server.counts.held_seconds == before
    group.close()


def test_a_new_link_of_a_shard_takes_the_place_of_the_old_one(group: Group, config):
    old, rng = connect(group), np.random.default_rng(9)
    ask(old, random_message(config, rng, 2))
    new = connect(group)
    message = random_message(config, rng, 2)
    assert torch.equal(ask(new, message), group.worker.compute(message))
    assert group.server.links() == {"shard": "shared-memory"}
    if isinstance(group.server, NativeLoop):
        with pytest.raises(LinkError, match="the group closed the link"):
            until(lambda: ask(old, message) is None)
    old.close()
    new.close()
