from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine, http_server, write_tokenizer

from isotherm.cluster.api.app import build_app
from isotherm.cluster.client import AsyncClient, Client
from isotherm.cluster.client.batch import ROWS_FAILED, ROWS_LEFT, BatchError, run, run_batch
from isotherm.cluster.text.tokenizer import Tokenizer


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


class Server:
    """Answers rows from a function of (custom prompt, number of the try); counts what is in flight."""

    def __init__(self, answer):
        self.answer = answer
        self.tries: dict = {}
        self.now = self.most = 0

    async def __call__(self, request):
        prompt = json.loads(request.content)["prompt"]
        self.tries[prompt] = self.tries.get(prompt, 0) + 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.002)
        self.now -= 1
        answer = self.answer(prompt, self.tries[prompt])
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        body = {"choices": [], "echo": prompt} if answer == 200 else {"error": {"message": "no", "param": None}}
        return httpx.Response(answer, json=body, headers={"x-request-id": "r", "retry-after": "0"})


def batch(source, output, server, concurrency=4, **options):
    async def go():
        async with AsyncClient(transport=httpx.MockTransport(server), max_retries=0) as client:
            return await run_batch(source, output, client, concurrency, backoff_s=0.001, **options)

    return asyncio.run(go())


def test_rows_once_each_with_bounded_concurrency(tmp_path):
    server, seen = Server(lambda prompt, _: 200), []
    source = write(tmp_path / "in", [row(i) for i in range(50)])
    summary = batch(source, tmp_path / "out", server, progress=lambda state: seen.append(state.completed))
    assert (summary.total, summary.completed, summary.failed, summary.unfinished) == (50, 50, 0, 0)
    assert server.most == 4 and seen == list(range(51))
    found = results(tmp_path / "out")
    assert sorted(one["custom_id"] for one in found) == sorted(f"row-{i}" for i in range(50))
    one = next(one for one in found if one["custom_id"] == "row-7")
    body = {"choices": [], "echo": "row 7"}
    assert one["response"] == {"status_code": 200, "request_id": "r", "body": body}
    assert one["error"] is None and one["id"]
    again = batch(source, tmp_path / "out", server)
    assert (again.resumed, again.completed) == (50, 0) and results(tmp_path / "out") == found


def test_errors_are_recorded_per_row(tmp_path):
    nan = {"model": "m", "prompt": float("nan")}
    rows = [
        row(0, url="/v1/embeddings"),
        row(1, method="GET"),
        row(2, body=[]),
        row(3, body={"stream": True}),
        row(4),
        row(5, body=nan),
        row(6, body={"prompt": "\ud800"}),
    ]
    summary = batch(write(tmp_path / "in", rows), tmp_path / "out", Server(lambda prompt, _: 400))
    assert (summary.completed, summary.failed) == (7, 7)
    found = {one["custom_id"]: one for one in results(tmp_path / "out")}
    for i, name in ((0, "url"), (1, "method"), (2, "body"), (3, "body.stream"), (5, "body"), (6, "body")):
        assert found[f"row-{i}"]["response"] is None and found[f"row-{i}"]["error"]["message"].startswith(name + ":")
    assert found["row-4"]["response"]["status_code"] == 400 and found["row-4"]["error"] is None


def test_transient_failures_are_tried_again(tmp_path):
    def answer(prompt, tries):
        return 200 if tries > 2 else 503 if tries == 1 else httpx.ConnectError("refused")

    server = Server(answer)
    summary = batch(write(tmp_path / "in", [row(i) for i in range(8)]), tmp_path / "out", server)
    assert (summary.completed, summary.failed) == (8, 0) and set(server.tries.values()) == {3}


def test_a_row_that_cannot_be_asked_is_left_for_the_next_run(tmp_path):
    source = write(tmp_path / "in", [row(i) for i in range(20)])
    server = Server(lambda prompt, _: 503 if prompt == "row 3" else 200)
    summary = batch(source, tmp_path / "out", server, attempts=2)
    assert summary.unfinished == 20 - summary.completed > 0 and "row-3" in summary.reason and "503" in summary.reason
    assert "row-3" not in {one["custom_id"] for one in results(tmp_path / "out")}
    summary = batch(source, tmp_path / "out", Server(lambda prompt, _: 200))
    assert (summary.unfinished, summary.reason) == (0, "")
    assert len(results(tmp_path / "out")) == len({one["custom_id"] for one in results(tmp_path / "out")}) == 20


NO_ANSWERS = {
    "a wrong path": httpx.Response(404, json={"error": {"message": "no such path", "code": "not_found"}}),
    "another server": httpx.Response(404, json={"detail": "Not Found"}),
    "a page": httpx.Response(200, text="<html>Welcome</html>"),
    "JSON of something else": httpx.Response(200, json={"status": "ok"}),
    "a page that says no": httpx.Response(403, text="<html>Forbidden</html>"),
    "a wrong key": httpx.Response(401, json={"error": {"message": "invalid key"}}),
    "a redirect": httpx.Response(302, headers={"location": "https://login.example"}),
    "a proxy's error": httpx.Response(500, text="Internal Server Error"),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_an_answer_that_is_none_is_not_written_and_ends_the_run(tmp_path, name):
    source = write(tmp_path / "in", [row(i) for i in range(9)])
    server = Server(lambda prompt, _: NO_ANSWERS[name] if prompt == "row 4" else 200)
    summary = batch(source, tmp_path / "out", server, concurrency=1)
    assert (summary.completed, summary.unfinished, summary.exit_status) == (4, 5, ROWS_LEFT)
    assert summary.reason.startswith("row-4: http")
    assert [one["custom_id"] for one in results(tmp_path / "out")] == [f"row-{i}" for i in range(4)]
    again = batch(source, tmp_path / "out", Server(lambda *_: 200))
    assert (again.completed, again.exit_status) == (5, 0)


@pytest.mark.parametrize("status", [502, 504])
def test_a_gateway_without_a_server_is_asked_again(tmp_path, status):
    server = Server(lambda prompt, tries: httpx.Response(status, text="<html>Bad Gateway</html>") if tries < 3 else 200)
    summary = batch(write(tmp_path / "in", [row(0)]), tmp_path / "out", server)
    assert (summary.completed, summary.failed, server.tries) == (1, 0, {"row 0": 3})
    never = Server(lambda *_: httpx.Response(status, text=""))
    summary = batch(write(tmp_path / "in", [row(1)]), tmp_path / "out", never, attempts=2)
    assert summary.unfinished == 1 and str(status) in summary.reason


def test_a_model_that_is_not_served_is_the_rows_own_error(tmp_path):
    error = {"message": "model: 'x' is not served here", "param": "model", "code": "model_not_found"}
    server = Server(lambda prompt, _: httpx.Response(404, json={"error": error}) if prompt == "row 0" else 200)
    summary = batch(write(tmp_path / "in", [row(0), row(1)]), tmp_path / "out", server)
    assert (summary.completed, summary.failed, summary.exit_status) == (2, 1, ROWS_FAILED)


def test_a_busy_server_is_waited_for_as_long_as_it_answers_others(tmp_path):
    """One row is refused until 20 others were answered: more than `attempts` times, and no reason to give up."""
    source = write(tmp_path / "in", [row(i) for i in range(40)])
    server = Server(lambda prompt, _: 429 if prompt == "row 0" and len(server.tries) < 21 else 200)
    summary = batch(source, tmp_path / "out", server, concurrency=2, attempts=3)
    assert (summary.completed, summary.unfinished) == (40, 0) and server.tries["row 0"] > 3


def test_errors_of_an_earlier_run_still_count(tmp_path):
    source = write(tmp_path / "in", [row(i) for i in range(14)])
    first = batch(source, tmp_path / "out", Server(lambda prompt, _: 200 if prompt == "row 3" else 400))
    assert (first.failed, first.exit_status) == (13, ROWS_FAILED)
    again = batch(source, tmp_path / "out", Server(lambda *_: 200))
    assert (again.resumed, again.failed, again.exit_status) == (14, 13, ROWS_FAILED)


def test_a_pipe_is_read(tmp_path):
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
        summary = batch(Path(f"/dev/fd/{reader}"), tmp_path / "out", Server(lambda *_: 200), concurrency=32)
    finally:
        thread.join()
        os.close(reader)
    assert (summary.total, summary.completed) == (500, 500)


def test_standard_input_is_read(tmp_path, served):
    code = "import sys, pathlib; from isotherm.cluster.client.batch import run; path = pathlib.Path"
    code += "; print(run(path('-'), path(sys.argv[1]), sys.argv[2]).completed)"
    command = [sys.executable, "-c", code, str(tmp_path / "out"), served[1] + "/v1"]
    rows = "".join(json.dumps(row(i)) + "\n" for i in range(5))
    done = subprocess.run(command, input=rows, capture_output=True, text=True)
    assert done.stdout.strip() == "5", done.stderr


@pytest.mark.parametrize("torn", [b'{"id": "x", "custom_id": "row-9", "resp', b"\x00\x00\n", b'{"custom_id": 5}\n'])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    source = write(tmp_path / "in", [row(i) for i in range(10)])
    batch(write(tmp_path / "half", [row(i) for i in range(4)]), tmp_path / "out", Server(lambda *_: 200))
    with open(tmp_path / "out", "ab") as file:
        file.write(torn)
    summary = batch(source, tmp_path / "out", Server(lambda *_: 200))
    assert (summary.resumed, summary.completed) == (4, 6)
    assert sorted(one["custom_id"] for one in results(tmp_path / "out")) == [f"row-{i}" for i in range(10)]


def test_bad_files_name_the_line(tmp_path):
    server = Server(lambda *_: 200)
    cases = [
        ([row(0), row(1), row(0)], "line 3: custom_id 'row-0' appears twice"),
        ([row(0), {"custom_id": 5}], "line 2"),
        ([[]], "line 1"),
    ]
    for rows, message in cases:
        with pytest.raises(BatchError, match=message):
            batch(write(tmp_path / "in", rows), tmp_path / "out", server)
    assert not server.tries
    source = write(tmp_path / "in", [row(0)])
    (tmp_path / "other").write_text("notes\nmore notes\n")
    with pytest.raises(BatchError, match="line 1 is not a batch result"):
        batch(source, tmp_path / "other", server)
    assert (tmp_path / "other").read_text() == "notes\nmore notes\n"
    with pytest.raises(BatchError, match="concurrency"):
        batch(source, tmp_path / "out", server, concurrency=0)
    with pytest.raises(FileNotFoundError):
        batch(tmp_path / "none", tmp_path / "out", server)


def test_a_second_run_on_the_same_output_is_refused(tmp_path):
    source = write(tmp_path / "in", [row(i) for i in range(3)])

    async def go():
        async with AsyncClient(transport=httpx.MockTransport(Server(lambda *_: 200))) as client:
            first = asyncio.ensure_future(run_batch(source, tmp_path / "out", client))
            await asyncio.sleep(0)
            with pytest.raises(BatchError, match="another batch"):
                await run_batch(source, tmp_path / "out", client)
            await first

    asyncio.run(go())
    assert len(results(tmp_path / "out")) == 3


def test_killed_and_resumed_equals_http(tmp_path, served, capsys):
    engine, url = served
    chat = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    rows = [row(i) for i in range(60)] + [
        row(i, url="/v1/chat/completions", body={**chat, "seed": i}) for i in range(60, 70)
    ]
    source, output = write(tmp_path / "in", rows), tmp_path / "out"
    code = (
        "import sys, pathlib; from isotherm.cluster.client.batch import run; "
        "run(*map(pathlib.Path, sys.argv[1:3]), sys.argv[3], 4)"
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
    summary = run(source, output, url, 8)
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
    summary = run(write(tmp_path / "in", [row(0)]), tmp_path / "out", served[1])
    assert summary.completed == 1
