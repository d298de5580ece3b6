"""The life and death of `isotherm serve`: whatever of it dies, it is back within seconds or ends with an error and
leaves nothing; asked to end, it finishes what it has begun."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from served import Served
from streams import Workload

pytestmark = pytest.mark.long

ROUNDS = int(os.environ.get("ISOTHERM_CHAOS_ROUNDS", "1"))  # `make chaos` asks for more
SMALL = {"attention": {"cpus": 0.2}, "experts": {"cpus": 0.1}, "autoscaling": {"mode": "off"}}
LIMIT = 10.0  # seconds from a death to an answer, or to the end
SUM = {"model": "tiny", "messages": [{"role": "user", "content": "What is 3 + 4?"}], "temperature": 0}


def answer_within(served: Served, seconds: float) -> float:
    """Seconds until a new request was answered."""
    begin, last = time.monotonic(), ""
    while time.monotonic() < begin + seconds:
        try:
            reply = httpx.post(
                f"{served.url}/v1/chat/completions", json=SUM, timeout=begin + seconds - time.monotonic()
            )
            if reply.status_code == 200:
                return time.monotonic() - begin
            last = f"HTTP {reply.status_code}: {reply.text}"
        except httpx.TransportError as error:
            last = repr(error)
        time.sleep(0.1)
    raise AssertionError(f"no answer within {seconds} s: {last}\n{served.log.read_text()}")


def end_within(served: Served, seconds: float) -> int:
    """The exit status."""
    try:
        return served.process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still there after {seconds} s:\n{served.log.read_text()}") from None


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    cluster = Served(SMALL, tmp_path_factory.mktemp("lifecycle"))
    with cluster:
        cluster.wait_ready()
        yield cluster
    assert cluster.process.returncode == 0
    assert cluster.left_over() == {"processes": [], "shared memory": []}


FRONT_DOOR = {"ray::ProxyActor": "HTTP proxy", "ray::ServeReplica": ""}  # as the terminal calls them


def told_within(served: Served, seconds: float, words: str) -> None:
    deadline = time.monotonic() + seconds
    while words not in (log := served.log.read_text()):
        assert time.monotonic() < deadline, log
        time.sleep(0.1)


@pytest.mark.parametrize("title", ["ray::ProxyActor", "ray::ServeReplica", "ray::ServeController"])
def test_what_serve_starts_again_is_back_within_seconds(served, title, record_property):
    for _ in range(ROUNDS):
        died, begin = served.find(title), time.monotonic()
        died.kill()
        died.wait(5)
        back = answer_within(served, LIMIT)
        while not served.has(title):
            assert time.monotonic() < begin + LIMIT, f"{title} is not back"
            time.sleep(0.1)
        print(f"{title} killed: answered after {back:.1f} s")
        record_property("seconds", back)
        assert served.process.poll() is None
        answer_within(served, LIMIT)
        if (called := FRONT_DOOR.get(title)) is not None:
            told_within(served, LIMIT, f"{called} (process {died.pid}) is lost; Ray Serve starts")
            told_within(served, LIMIT, f" was started in the place of process {died.pid}\n")


def test_a_proxy_that_serve_does_not_miss_is_back_within_seconds(served):
    """As after a call that Ray has lost: Serve's controller waits, and would for minutes. Here it hangs, and Ray gives
    it a second to end by itself."""
    controller, died = served.find("ray::ServeController"), served.find("ray::ProxyActor")
    controller.suspend()
    died.kill()
    died.wait(5)
    back = answer_within(served, LIMIT + 2)
    print(f"ray::ProxyActor killed while Serve's controller stood still: answered after {back:.1f} s")
    controller.wait(5)
    assert served.find("ray::ServeController").pid != controller.pid
    assert "Ray Serve has lost its proxy" in served.log.read_text()


def test_the_terminal_tells_of_a_lost_worker_and_when_all_is_whole_again(served):
    before = {w["id"]: w for w in served.status()["workers"] if w["role"] == "expert"}
    worker = before["expert-0"]
    os.kill(worker["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while "whole again" not in (log := served.log.read_text()):
        assert time.monotonic() < deadline, log
        time.sleep(0.1)
    assert f"expert group {worker['id']} (process {worker['pid']}) is lost; it is being replaced" in log
    [new] = [w for w in served.status()["workers"] if w["role"] == "expert" and w["id"] not in before]
    assert f" s: expert group {new['id']} (process {new['pid']}) in the place of {worker['id']}\n" in log


@pytest.mark.parametrize("name", ["raylet", "gcs_server", "ray::DashboardAgent", "ray::RuntimeEnvAgent"])
def test_without_its_ray_it_ends_with_an_error_and_leaves_nothing(tmp_path, name, record_property):
    served = Served(SMALL, tmp_path)
    with served:
        served.wait_ready()
        begin = time.monotonic()
        served.find(name).kill()
        status = end_within(served, LIMIT)
        took = time.monotonic() - begin
    print(f"{name} killed: ended after {took:.1f} s")
    record_property("seconds", took)
    assert status == 1
    assert served.left_over(patience=1) == {"processes": [], "shared memory": []}
    log = served.log.read_text()
    last = log[log.index("isotherm: ") :].splitlines()
    assert (
        "has ended, and nothing can be served without it" in last[0] and "logs are in" in last[1] and len(last) == 2
    ), log
    assert "***" not in log and "Traceback" not in log, log


# --- being asked to end ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workload() -> tuple[Workload, list[str]]:
    work = Workload(16, [150, 400])
    return work, work.alone()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_asked_to_end_under_load_it_finishes_what_it_has_begun(tmp_path, workload, how):
    work, expected = workload
    for i in range(ROUNDS):
        (tmp_path / str(i)).mkdir()
        served = Served(SMALL | {"http": {"drain_seconds": 60}}, tmp_path / str(i))
        with served, ThreadPoolExecutor() as pool:
            served.wait_ready()
            load = pool.submit(lambda served=served: asyncio.run(work.serve(served.url)))
            time.sleep(1.0)
            served.process.send_signal(how)
            time.sleep(1.0)
            refused = httpx.post(f"{served.url}/v1/chat/completions", json=SUM, timeout=10) if not load.done() else None
            streams = load.result()
            assert end_within(served, 60) == 0, served.log.read_text()
        assert refused is None or (refused.status_code, refused.headers.get("retry-after")) == (503, "2"), refused.text
        assert [s.error for s in streams if s.error] == []
        assert [s.text for s in streams] == expected
        assert served.left_over(patience=1) == {"processes": [], "shared memory": []}
        after = served.log.read_text().partition("(Ctrl-C ends it)\n")[2].splitlines()
        said = [line for line in after if not line.startswith("  ")]  # what is indented belongs to "ready"
        assert said == ["stopping; open requests have 60 s to finish, a second signal ends them at once"], after


def test_a_second_signal_ends_it_at_once(tmp_path):
    served = Served(SMALL, tmp_path)
    with served, ThreadPoolExecutor() as pool:
        served.wait_ready()
        load = pool.submit(lambda: asyncio.run(Workload(8, [3000]).serve(served.url)))
        time.sleep(2.0)
        served.process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        served.process.send_signal(signal.SIGTERM)
        assert end_within(served, 5) == 128 + signal.SIGTERM
        streams = load.result()
    assert any(s.cut for s in streams) and all(s.cut or s.done for s in streams), streams
    assert served.left_over(patience=1) == {"processes": [], "shared memory": []}


def test_the_terminal_goes(tmp_path, workload):
    """SIGHUP, and nothing can be printed any more."""
    import fcntl
    import pty
    import termios

    work, expected = workload
    served = Served(SMALL, tmp_path)
    ours, theirs = pty.openpty()

    def on_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    served.start_as = {
        "stdin": theirs,
        "stdout": theirs,
        "stderr": theirs,
        "start_new_session": True,
        "preexec_fn": on_terminal,
    }
    shown, gone = bytearray(), threading.Event()

    def show() -> None:  # a terminal that nobody reads would stop who writes to it
        while not gone.is_set():
            if select.select([ours], [], [], 0.1)[0]:
                shown.extend(os.read(ours, 4096))

    terminal = threading.Thread(target=show, daemon=True)
    terminal.start()
    with served, ThreadPoolExecutor() as pool:
        os.close(theirs)
        while b"ready  " not in shown and b"ready\x1b" not in shown:
            time.sleep(0.1)
        load = pool.submit(lambda: asyncio.run(work.serve(served.url)))
        time.sleep(1.0)
        gone.set()
        terminal.join()
        os.close(ours)
        streams = load.result()
        assert end_within(served, 60) == 0
    assert [s.error for s in streams if s.error] == []
    assert [s.text for s in streams] == expected
    assert served.left_over(patience=1) == {"processes": [], "shared memory": []}


# --- an update ------------------------------------------------------------------------------------


def redeploy(served: Served) -> None:
    update = "roll", "--ingress", str(served.manifest), "--address", served.ray_address()
    done = served.command(*update, timeout=240)  # it waits for the drain
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(600)
def test_an_update_of_the_ingress_drains_and_then_says_that_it_ends_a_stream(tmp_path, workload):
    short, long = workload[0], Workload(48, [3900])  # more than is done while a replica starts
    served = Served(SMALL | {"http": {"drain_seconds": 2}}, tmp_path)
    with served, ThreadPoolExecutor() as pool:
        served.wait_ready()
        before = served.find("ray::ServeReplica").pid
        loads = [pool.submit(lambda work=work: asyncio.run(work.serve(served.url))) for work in (long, short)]
        time.sleep(1.0)
        served.manifest.write_text(served.manifest.read_text().replace("drain_seconds: 2", "drain_seconds: 120"))
        update = pool.submit(redeploy, served)
        while not update.done():  # no moment without a replica that answers
            answer_within(served, LIMIT)
        update.result()
        cut, whole = (load.result() for load in loads)
        assert [s.cut for s in [*cut, *whole] if s.cut] == [], "a stream has ended without a word"
        assert all("is being stopped or updated" in s.error for s in cut if s.error) and any(s.error for s in cut), cut
        first = Workload(4, [3900])  # the first of the long ones
        assert first.requests == long.requests[:4]
        for stream, alone in zip(cut, first.alone(), strict=False):
            assert alone.startswith(stream.text) and (stream.error or stream.text == alone)
        for stream, alone in zip(whole, workload[1], strict=True):
            assert alone.startswith(stream.text) and (stream.error or stream.text == alone)
        deadline = time.monotonic() + 20
        while served.process_is_there(before) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not served.process_is_there(before)
        # With time enough nothing is cut.
        patient = Workload(4, [2500])
        load = pool.submit(lambda: asyncio.run(patient.serve(served.url)))
        time.sleep(1.0)
        redeploy(served)
        streams = load.result()
        assert [s.error for s in streams if s.error] == []
        assert [s.text for s in streams] == patient.alone()
        assert " is lost" not in served.log.read_text(), "those that Serve has ended are none"
    assert served.left_over() == {"processes": [], "shared memory": []}


# --- where it is started --------------------------------------------------------------------------


def test_an_http_proxy_is_for_others_and_what_is_to_be_copied_stays_whole(tmp_path):
    nowhere = "http://127.0.0.1:9"
    environment = {"http_proxy": nowhere, "https_proxy": nowhere, "HTTP_PROXY": nowhere, "COLUMNS": "40"}
    served = Served(SMALL, tmp_path, environment=environment | {"no_proxy": "", "NO_PROXY": ""})
    with served:
        served.wait_ready()
        lines = served.log.read_text().partition("(Ctrl-C ends it)\n")[2].splitlines()
        assert lines[0].startswith("  curl http://") and lines[0].endswith("\\") and lines[1].endswith("'"), lines
        command = "\n".join(lines[:2])
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=30, env=os.environ | {"no_proxy": "*"}
        )
        assert "7" in json.loads(done.stdout)["choices"][0]["message"]["content"], done
    assert served.left_over() == {"processes": [], "shared memory": []}


def test_the_address_for_ray_jobs_is_taken_for_commands_too(tmp_path):
    served = Served(SMALL, tmp_path)
    with served:
        served.wait_ready()
        dashboard = f"http://{served.status()['dashboard'].removeprefix('http://')}"
        done = served.command("status", "--json", RAY_ADDRESS=dashboard)
        assert done.returncode == 0 and json.loads(done.stdout)["url"] == served.url, done
        done = served.command("top", "--once", RAY_ADDRESS=dashboard)
        assert done.returncode == 0 and "attention-0" in done.stdout, done
        done = served.command("stop", RAY_ADDRESS=dashboard, timeout=150)
        assert (done.returncode, done.stdout) == (0, "stopped\n"), done
        assert end_within(served, 5) == 0
    assert served.left_over(patience=1) == {"processes": [], "shared memory": []}
