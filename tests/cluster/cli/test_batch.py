"""`isotherm batch` as a process and on a terminal, and with a cluster of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_engine import FakeEngine, http_server, write_tokenizer

from isotherm.cluster.api.app import build_app
from isotherm.cluster.cli import batch as cli_batch
from isotherm.cluster.cli.batch import at_hand, run, run_on_own
from isotherm.cluster.client import Client
from isotherm.cluster.client.batch import BatchOptions
from isotherm.cluster.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

FEW = BatchOptions(8)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    engine = FakeEngine(tokenizer.vocab_size)
    with http_server(build_app(engine, tokenizer, "m")) as url:
        yield engine, url
    tokenizer.chat_template.close()


def row(i, **fields):
    body = {"model": "m", "prompt": f"row {i}", "max_tokens": 6, "temperature": 0}
    return {"custom_id": f"row-{i}", "method": "POST", "url": "/v1/completions", "body": body, **fields}


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def results(path):
    lines = path.read_text().split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def test_a_pipe_is_read(tmp_path, served):
    reader, writer = os.pipe()
    data = "".join(json.dumps(row(i)) + "\n" for i in range(500)).encode()

    def write_slowly():
        with open(writer, "wb") as file:
            file.write(data[:9000])
            file.flush()
            file.write(data[9000:])

    thread = threading.Thread(target=write_slowly)
    thread.start()
    try:
        summary = run(Path(f"/dev/fd/{reader}"), tmp_path / "out", served[1], BatchOptions(32))
    finally:
        thread.join()
        os.close(reader)
    assert (summary.total, summary.completed) == (500, 500)


def test_standard_input_is_read(tmp_path, served):
    code = "import sys, pathlib; from isotherm.cluster.cli.batch import BatchOptions, run; path = pathlib.Path"
    code += "; print(run('-', path(sys.argv[1]), sys.argv[2], BatchOptions()).completed)"
    command = [sys.executable, "-c", code, str(tmp_path / "out"), served[1] + "/v1"]
    rows = "".join(json.dumps(row(i)) + "\n" for i in range(5))
    done = subprocess.run(command, input=rows, capture_output=True, text=True)
    assert done.stdout.strip() == "5", done.stderr


def test_killed_and_resumed_equals_http(tmp_path, served, capsys):
    engine, url = served
    chat = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    rows = [row(i) for i in range(60)] + [
        row(i, url="/v1/chat/completions", body={**chat, "seed": i}) for i in range(60, 70)
    ]
    source, output = write(tmp_path / "in", rows), tmp_path / "out"
    code = (
        "import sys, pathlib; from isotherm.cluster.cli.batch import BatchOptions, run; "
        "run(*map(pathlib.Path, sys.argv[1:3]), sys.argv[3], BatchOptions(4))"
    )
    engine.delay_s = 0.02
    child = subprocess.Popen([sys.executable, "-c", code, str(source), str(output), url], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (not output.exists() or output.read_bytes().count(b"\n") < 20):
        time.sleep(0.01)
    child.kill()
    child.communicate()
    engine.delay_s = 0.0
    before = output.read_bytes()
    assert 20 <= before.count(b"\n") < 70
    summary = run(source, output, url, FEW)
    assert (
        summary.resumed == before.count(b"\n") and summary.resumed + summary.completed == 70 and summary.unfinished == 0
    )
    assert "batch: 70 of 70 rows done, 0 failed" in capsys.readouterr().err
    assert output.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    found = {one["custom_id"]: one for one in results(output)}
    assert len(found) == len(results(output)) == 70
    with Client(url) as client:
        for one in rows:
            answer = client.request("POST", one["url"], one["body"])
            assert found[one["custom_id"]]["response"]["body"]["choices"] == answer.body["choices"]


def test_progress_bar_on_a_terminal(tmp_path, served, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    summary = run(write(tmp_path / "in", [row(0)]), tmp_path / "out", served[1], FEW)
    assert summary.completed == 1


@pytest.fixture
def clusters(monkeypatch, served):
    """What is served for a batch alone: the arguments of each, and whether it has ended."""
    begun = []

    class Cluster:
        def __init__(self, *arguments):
            self.arguments, self.ended, self.url = arguments, False, served[1]
            begun.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.ended = True

    monkeypatch.setattr(cli_batch, "OwnCluster", Cluster)
    return begun


def test_a_cluster_of_its_own_ends_with_the_batch(tmp_path, clusters):
    source = str(write(tmp_path / "in", [row(0), row(1)]))
    summary = run_on_own("tiny", None, [source], tmp_path / "out", FEW)
    assert summary.completed == 2
    run_on_own("tiny.yaml", "10.0.0.1:6379", [source], tmp_path / "out", FEW)
    assert [(one.arguments, one.ended) for one in clusters] == [
        (("tiny",), True),
        (("tiny.yaml", "--address", "10.0.0.1:6379"), True),
    ]


def test_no_cluster_is_started_for_a_file_that_is_not_there(tmp_path, clusters):
    with pytest.raises(FileNotFoundError):
        run_on_own("tiny", None, [str(tmp_path / "none")], tmp_path / "out", FEW)
    assert not clusters


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_cluster_too(tmp_path, clusters, served, number):
    engine, _ = served
    engine.delay_s = 0.05
    source = str(write(tmp_path / "in", [row(i) for i in range(100)]))
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    timer.start()
    try:
        with pytest.raises(SystemExit) as info:
            run_on_own("tiny", None, [source], tmp_path / "out", FEW)
    finally:
        engine.delay_s = 0.0
        timer.join()
    assert info.value.code == 128 + number and clusters[0].ended
    assert run_on_own("tiny", None, [source], tmp_path / "out", FEW).exit_status == 0  # the rest


def test_what_lies_elsewhere_is_read_into_files_for_the_time_of_the_batch(monkeypatch):
    asked = []

    def fetch_tables(address, uris, folder):
        asked.append((address, uris))
        files = [folder / str(i) for i in range(len(uris))]
        for file in files:
            file.write_text("")
        return files

    monkeypatch.setattr("isotherm.cluster.on_ray.datasets.fetch_tables", fetch_tables)
    monkeypatch.setattr(cli_batch, "prepare_attach", lambda _: "a")
    with at_hand(["x.jsonl", "s3://t", "-"]) as inputs:
        assert inputs[0] == "x.jsonl" and inputs[2] == "-" and Path(inputs[1]).is_file()
    assert not Path(inputs[1]).exists() and asked == [("a", ["s3://t"])]
    with at_hand(["x.jsonl", "-"]) as inputs:
        assert inputs == ["x.jsonl", "-"] and len(asked) == 1


def test_a_signal_that_it_was_started_to_ignore_stays_ignored():
    """A batch under nohup ended with its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli_batch._Ending().taken():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
