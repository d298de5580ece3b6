"""Links over two-rank gloo groups: all on the host, and as between GPUs, where bodies pass through memory that is used
again, or rows go over a process group of their own (gloo here, NCCL there)."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from faults import stop
from link_peers import make_worker, process, random_message, random_pause, serve_process_group
from torch import Tensor
from waiting import until

from isotherm.actors.experts.python_loop import PythonLoop
from isotherm.actors.links import process_group
from isotherm.actors.links.device_lane import DataLane, open_data_lane
from isotherm.actors.links.process_group import CPU, ProcessGroupLink, ProcessGroupServerLink, open_process_group
from isotherm.actors.links.protocol import Dispatch, ExpertNotHeldError, LinkEnd, LinkError
from isotherm.actors.links.registry import CARRIERS
from isotherm.actors.links.rendezvous import Rendezvous
from isotherm.actors.links.wire import HostMemory
from isotherm.cluster.messages.workers import Meeting
from isotherm.cluster.model.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

HOST = "127.0.0.1"
SEED = int(os.environ.get("ISOTHERM_TEST_SEED", "20261122"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), dtype="float32")


@pytest.fixture(scope="module")
def config(path: Path):
    return Checkpoint.open(path).config


@pytest.fixture(scope="module")
def rendezvous() -> Rendezvous:
    return Rendezvous(HOST)


@pytest.fixture
def server(path: Path) -> PythonLoop:
    return PythonLoop(make_worker(path, native=False, held=[(1, e) for e in range(12)] + [(2, 0)]))


Way = Literal["plain", "staged", "lane"]
WAYS: tuple[Way, ...] = ("plain", "staged", "lane")


def connect(
    rendezvous: Rendezvous, server: PythonLoop, shard: str = "shard", timeout: float = 20.0, way: Way = "plain"
) -> ProcessGroupLink:
    prefix = uuid.uuid4().hex

    def end(rank: int) -> tuple[Any, dict[str, Any]]:
        """Process group of one end, and its lane or memory."""
        group = open_process_group(HOST, rendezvous.port, prefix, rank, HOST, 20.0)
        if way != "lane":
            return group, {"allocate": forgetful if way == "staged" else None}
        lane = DataLane(
            open_process_group(HOST, rendezvous.port, f"{prefix}/rows", rank, HOST, 20.0), 1 - rank, CPU, timeout
        )
        lane.greet(first=rank == 0)
        return group, {"lane": lane}

    def serve() -> None:
        group, rest = end(1)
        server.attach(shard, ProcessGroupServerLink(group, server.worker.config.hidden_size, **rest))

    thread = threading.Thread(target=serve)
    thread.start()
    group, rest = end(0)
    link = ProcessGroupLink(group, timeout, **rest)
    thread.join()
    return link


def forgetful(nbytes: int) -> Tensor:
    """What has not been written shows."""
    return torch.full((nbytes,), 0xAA, dtype=torch.uint8)


def ask(link: ProcessGroupLink, message: Dispatch) -> Tensor:
    link.send(message)
    return link.receive()


@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_those_of_a_function_call(rendezvous: Rendezvous, server: PythonLoop, config, way: Way):
    link, rng = connect(rendezvous, server, way=way), np.random.default_rng(0)
    answers = []
    for rows in (1, 2, 0, 9, 50, 1, 300):
        message = random_message(config, rng, rows, layer=1)
        before = server.worker.rows_served.copy()
        answer = ask(link, message)
        assert ((server.worker.rows_served - before)[1, message.experts_A] == np.diff(message.offsets_A1)).all()
        answers.append((answer, server.worker.compute(message)))
        assert torch.equal(*answers[-1])
    assert all(torch.equal(*pair) for pair in answers)  # a later message leaves earlier answers as they are
    assert server.links() == {"shard": link.kind}
    assert link.kind == ("process-group (gloo, rows over NCCL)" if way == "lane" else "process-group (gloo)")
    until(lambda: server.counts.messages == 7)
    link.close()


@pytest.mark.parametrize("way", WAYS)
def test_several_links_are_served_side_by_side(rendezvous: Rendezvous, server: PythonLoop, config, way: Way):
    links, wrong = [connect(rendezvous, server, f"shard-{i}", way=way) for i in range(3)], []
    work = [
        [random_message(config, np.random.default_rng([1, i, j]), 1 + j % 7, layer=1) for j in range(30)]
        for i in range(3)
    ]
    alone = [[server.worker.compute(m) for m in messages] for messages in work]

    def run(i: int) -> None:
        wrong.extend(i for m, y in zip(work[i], alone[i], strict=True) if not torch.equal(ask(links[i], m), y))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and sorted(server.links()) == ["shard-0", "shard-1", "shard-2"]
    for link in links:
        link.close()


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_is_not_held_is_named_and_the_link_goes_on(
    rendezvous: Rendezvous, server: PythonLoop, config, way: Way
):
    link, x = connect(rendezvous, server, way=way), torch.ones(1, config.hidden_size)
    missing = Dispatch(2, 17, x, np.zeros(2, np.int32), np.array([3, 4], np.int32), np.array([0, 1, 2], np.int32))
    held = Dispatch(2, 17, x, np.zeros(1, np.int32), np.array([0], np.int32), np.array([0, 1], np.int32))
    for _ in range(2):
        with pytest.raises(ExpertNotHeldError, match=r"layer 2 experts \[3, 4\] are not held \(placement version 17\)"):
            ask(link, missing)
        assert torch.equal(ask(link, held), server.worker.compute(held))
    until(lambda: (server.counts.messages, server.counts.refused) == (4, 2))
    link.close()


def test_a_failure_in_the_group_is_told(rendezvous: Rendezvous, server: PythonLoop, config):
    link = connect(rendezvous, server)
    message = Dispatch(
        99,
        1,
        torch.ones(1, config.hidden_size),
        np.zeros(1, np.int32),
        np.zeros(1, np.int32),
        np.array([0, 1], np.int32),
    )
    with pytest.raises(LinkError, match="the group failed: IndexError"):
        ask(link, message)
    link.close()


def test_closing_tells_the_group(rendezvous: Rendezvous, server: PythonLoop, config):
    link = connect(rendezvous, server)
    ask(link, random_message(config, np.random.default_rng(2), 2, layer=1))
    link.in_step(True)
    link.close()
    until(lambda: not server.links())


def test_a_killed_group_is_noticed_long_before_the_timeout(rendezvous: Rendezvous, path: Path, config):
    rng, pauses = np.random.default_rng(SEED), random.Random(SEED)
    for _ in range(3):
        prefix = uuid.uuid4().hex
        with process(serve_process_group, path, HOST, rendezvous.port, prefix) as pid:
            link = ProcessGroupLink(open_process_group(HOST, rendezvous.port, prefix, 0, HOST, 20.0), 30.0)
            ask(link, random_message(config, rng, 3))
            threading.Timer(random_pause(pauses), os.kill, (pid, signal.SIGKILL)).start()
            begin = time.perf_counter()
            with pytest.raises(LinkError):
                while True:
                    ask(link, random_message(config, rng, 5))
            assert time.perf_counter() - begin < 5.0
            link.close()


def test_a_stopped_group_is_lost_at_the_timeout(rendezvous: Rendezvous, path: Path, config):
    prefix, rng = uuid.uuid4().hex, np.random.default_rng(3)
    with process(serve_process_group, path, HOST, rendezvous.port, prefix) as pid:
        link = ProcessGroupLink(open_process_group(HOST, rendezvous.port, prefix, 0, HOST, 20.0), 0.5)
        ask(link, random_message(config, rng, 3))
        stop(pid)
        begin = time.perf_counter()
        with pytest.raises(LinkError):
            ask(link, random_message(config, rng, 3))
        assert 0.4 < time.perf_counter() - begin < 5.0


def test_nobody_comes(rendezvous: Rendezvous):
    with pytest.raises(LinkError, match="no link could be made"):
        open_process_group(HOST, rendezvous.port, uuid.uuid4().hex, 0, HOST, 0.2)


# --- as between GPUs ------------------------------------------------------------------------------


def test_rows_that_were_announced_and_do_not_come_end_the_lane(rendezvous: Rendezvous):
    prefix, lanes, aborted = uuid.uuid4().hex, {}, []

    def open_end(rank: int) -> None:
        group = open_process_group(HOST, rendezvous.port, prefix, rank, HOST, 20.0)
        lanes[rank] = DataLane(group, 1 - rank, CPU, 0.3, lambda: aborted.append(rank))

    other = threading.Thread(target=open_end, args=(1,))
    other.start()
    open_end(0)
    other.join()
    assert lanes[0].receive(0, 5, torch.bfloat16).shape == (0, 5)  # nothing is sent for no rows
    begin = time.perf_counter()
    with pytest.raises(LinkError):
        lanes[0].receive(2, 5, torch.bfloat16)
    assert 0.2 < time.perf_counter() - begin < 5.0 and aborted == [0]


def test_the_shard_of_a_link_with_a_lane_sees_a_killed_group_at_once(rendezvous: Rendezvous, path: Path, config):
    """By the host's process group, which goes first."""
    prefix = uuid.uuid4().hex
    with process(serve_process_group, path, HOST, rendezvous.port, prefix) as pid:
        group = open_process_group(HOST, rendezvous.port, prefix, 0, HOST, 20.0)
        closed: list[int] = []
        link = ProcessGroupLink(group, 30.0, lane=DataLane(_NoRows(), 1, CPU, 30.0, lambda: closed.append(1)))
        os.kill(pid, signal.SIGKILL)
        begin = time.perf_counter()
        with pytest.raises(LinkError):
            ask(link, random_message(config, np.random.default_rng(5), 3))
        assert time.perf_counter() - begin < 5.0
        link.close()
        assert closed == [1]


class _NoRows:
    """A process group whose peer never asks for what is sent."""

    def send(self, rows: list[Tensor], peer: int, tag: int) -> object:
        return object()


def test_host_memory_is_used_again_and_grows():
    memory = HostMemory(CPU, forgetful)
    first = memory.take(100)
    assert memory.take(40).data_ptr() == first.data_ptr()
    assert len(memory.take(150)) == 150 and memory.take(200).data_ptr() == memory.take(1).data_ptr()
    fresh = HostMemory(CPU)
    kept = fresh.take(10)
    assert not fresh.reused and fresh.take(10).data_ptr() != kept.data_ptr()


def test_without_nccl_a_link_between_gpus_says_so(rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("torch.distributed.ProcessGroupNCCL", raising=False)
    with pytest.raises(LinkError, match=r"torch .* has no NCCL"):
        open_data_lane(HOST, rendezvous.port, uuid.uuid4().hex, 0, device=torch.device("cuda"), meeting=1, timeout=1)


@pytest.mark.parametrize("kind", ["process-group", "process-group-nccl"])
def test_a_lane_for_rows_is_opened_between_gpus_alone(kind, rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch):
    opened: dict[int, tuple[Any, Any]] = {}
    monkeypatch.setattr(process_group, "open_data_lane", lambda *where, **how: (where, how))
    meeting = Meeting(HOST, rendezvous.port, uuid.uuid4().hex, 20.0, kind)
    carrier = CARRIERS[kind]
    assert isinstance(carrier, process_group.ProcessGroups)
    end = LinkEnd(host=HOST, device=CPU, dtype=torch.bfloat16, width=8, top_k=2, timeout=5.0)

    def meet(rank: int) -> None:
        opened[rank] = carrier.meet(meeting, end, rank)

    other = threading.Thread(target=meet, args=(1,))
    other.start()
    meet(0)
    other.join()
    assert [opened[rank][0].rank() for rank in (0, 1)] == [0, 1]
    if kind == "process-group":
        assert opened[0][1] is opened[1][1] is None
    else:
        assert [opened[rank][1] for rank in (0, 1)] == [
            ((HOST, rendezvous.port, meeting.prefix, rank), {"device": CPU, "meeting": 20.0, "timeout": 5.0})
            for rank in (0, 1)
        ]


def test_a_shard_that_never_takes_its_answer_holds_up_nobody(rendezvous: Rendezvous, server: PythonLoop, config):
    """As one that was stopped in mid-step: gloo hands a body over only when the peer asks for it."""
    hung, other = connect(rendezvous, server, "hung"), connect(rendezvous, server, "other")
    rng = np.random.default_rng(4)
    hung.send(random_message(config, rng, 200, layer=1))
    for _ in range(5):
        message = random_message(config, rng, 3, layer=1)
        assert torch.equal(ask(other, message), server.worker.compute(message))
