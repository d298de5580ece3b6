"""A run of a batch against a scripted server: each row once, errors per row, what is left, resumption."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from isotherm.cluster.client import APIError, AsyncClient, BatchError, Client, read_results
from isotherm.cluster.client.batch import ROWS_FAILED, ROWS_LEFT, BatchOptions, run_batch, run_rows


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
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
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


def batch(source, output, server, concurrency=4, progress=None, **options):
    async def go():
        async with AsyncClient(transport=httpx.MockTransport(server), max_retries=0) as client:
            given = BatchOptions(concurrency, backoff_s=0.001, **options)
            return await run_batch(source, output, client, given, progress)

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


UNKNOWN = {
    "model": {"message": "model: 'x' is not served here", "param": "model", "code": "model_not_found"},
    "a model of a server that names no field": {"message": "no such model", "code": "model_not_found"},
    "response": {
        "message": "previous_response_id: 'resp_1' is not kept here",
        "param": "previous_response_id",
        "code": "previous_response_not_found",
    },
    "item": {"message": "input[0].id: 'msg_1' is not kept here", "param": "input[0].id", "code": "item_not_found"},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_a_row_names_and_the_server_does_not_know_is_the_rows_own_error(tmp_path, name):
    error = UNKNOWN[name]
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


@pytest.mark.parametrize("torn", [b'{"id": "x", "custom_id": "row-9", "resp', b"\x00\x00\n", b'{"custom_id": 5}\n'])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    source = write(tmp_path / "in", [row(i) for i in range(10)])
    batch(write(tmp_path / "half", [row(i) for i in range(4)]), tmp_path / "out", Server(lambda *_: 200))
    with open(tmp_path / "out", "ab") as file:
        file.write(torn)
    summary = batch(source, tmp_path / "out", Server(lambda *_: 200))
    assert (summary.resumed, summary.completed) == (4, 6)
    assert sorted(one["custom_id"] for one in results(tmp_path / "out")) == [f"row-{i}" for i in range(10)]


def test_what_cannot_run_is_said_before_any_work(tmp_path):
    server = Server(lambda *_: 200)
    source = write(tmp_path / "in", [row(0)])
    (tmp_path / "notes").write_text("notes\nmore notes\n")
    with pytest.raises(BatchError, match=r"notes:1: not JSON: .*; expected JSON Lines"):
        batch(tmp_path / "notes", tmp_path / "out", server)
    with pytest.raises(BatchError, match="line 1 is not a batch result"):
        batch(source, tmp_path / "notes", server)
    assert (tmp_path / "notes").read_text() == "notes\nmore notes\n"
    with pytest.raises(BatchError, match="concurrency"):
        batch(source, tmp_path / "out", server, concurrency=0)
    with pytest.raises(FileNotFoundError):
        batch(tmp_path / "none", tmp_path / "out", server)
    assert not server.tries


def test_a_file_as_people_have_it(tmp_path):
    """A BOM, CRLF, blank lines, rows without a name or with a number, twice the same and twice not, no rows, and an
    end that is not there yet: every row is answered once, and the summary says what was odd."""
    lines = [
        b"\xef\xbb\xbf" + json.dumps(row(0)).encode() + b"\r\n",
        b"\r\n",
        b'{"prompt": "plain"}\r\n',
        json.dumps(row(0)).encode() + b"\n",
        json.dumps(row(0, body={"prompt": "another"})).encode() + b"\n",
        json.dumps(row(1) | {"custom_id": 5}).encode() + b"\n",
        b"oops\n",
        b"[1, 2]\n",
        b'{"custom_id": "row-8", "meth',
    ]
    source, server = tmp_path / "in.jsonl", Server(lambda *_: 200)
    source.write_bytes(b"".join(lines))
    summary = batch(source, tmp_path / "out", server)
    assert (summary.total, summary.completed, summary.failed, summary.unfinished) == (6, 6, 2, 1)
    assert summary.exit_status == ROWS_LEFT and "in.jsonl:9 is half written" in summary.reason
    assert set(server.tries) == {"row 0", "plain", "another", "row 1"} and set(server.tries.values()) == {1}
    names = sorted((one["custom_id"], one.get("occurrence", 1)) for one in results(tmp_path / "out"))
    assert names == [("5", 1), ("in.jsonl:3", 1), ("in.jsonl:7", 1), ("in.jsonl:8", 1), ("row-0", 1), ("row-0", 2)]
    notes = "\n".join(summary.notes)
    for words in ("1 without", "1 with a number", "1 repeated", "1 with the custom_id of another", "1 blank"):
        assert words in notes
    # The rest of it came.
    source.write_bytes(b"".join(lines[:-1]) + json.dumps(row(8)).encode())
    again = batch(source, tmp_path / "out", server)
    assert (again.resumed, again.completed, again.unfinished) == (6, 1, 0) and server.tries["row 8"] == 1


def test_three_urls_in_one_file(tmp_path):
    asked = []

    def answer(request):
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "served"}]})
        asked.append((request.url.path, json.loads(request.content)))
        body = {"output": [], "status": "failed"} if "responses" in request.url.path else {"choices": [{}]}
        return httpx.Response(200, json=body)

    rows = [
        {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"model": "m", "input": "hi"}},
        {"custom_id": "b", "messages": [], "priority": 3},
        {"prompt": "hi", "n": 2},
    ]
    source = write(tmp_path / "in", rows)

    async def go():
        async with AsyncClient(transport=httpx.MockTransport(answer)) as client:
            return await run_batch(source, tmp_path / "out", client, BatchOptions(1))

    summary = asyncio.run(go())
    assert asked == [
        ("/v1/responses", {"model": "m", "input": "hi", "priority": 100}),
        ("/v1/chat/completions", {"messages": [], "priority": 3, "model": "served"}),
        ("/v1/completions", {"prompt": "hi", "n": 2, "model": "served", "priority": 100}),
    ]
    assert (summary.completed, summary.failed) == (3, 1)  # a response that failed says so with status 200


def test_no_priority_is_sent_where_none_is_wanted(tmp_path):
    bodies = []

    def answer(request):
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": []})

    async def go():
        async with AsyncClient(transport=httpx.MockTransport(answer)) as client:
            await run_batch(write(tmp_path / "in", [row(0)]), tmp_path / "out", client, BatchOptions(priority=0))

    asyncio.run(go())
    assert bodies == [row(0)["body"]]


def test_a_server_that_is_not_there_leaves_rows_without_a_model(tmp_path):
    tries = []

    def answer(request):
        tries.append(request.url.path)
        raise httpx.ConnectError("refused")

    source = write(tmp_path / "in", [{"prompt": "hi"}, row(1)])

    async def go():
        async with AsyncClient(transport=httpx.MockTransport(answer), max_retries=0) as client:
            return await run_batch(source, tmp_path / "out", client, BatchOptions(attempts=3, backoff_s=0.001))

    summary = asyncio.run(go())
    assert tries == ["/v1/models"] * 3 and "which model" in summary.reason and "refused" in summary.reason
    assert (summary.unfinished, summary.exit_status) == (2, ROWS_LEFT)


def test_rows_in_memory_have_results_in_their_order():
    def answer(request):
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        body = json.loads(request.content)
        text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        if text == "bad":
            return httpx.Response(400, json={"error": {"message": "no such thing"}})
        return httpx.Response(200, json={"choices": [{"text": text}]})

    rows = ["one", {"prompt": "two"}, "bad", 5, "one"]

    async def waiting():
        async with AsyncClient(transport=httpx.MockTransport(answer)) as client:
            return await client.batch(rows)

    with Client(transport=httpx.MockTransport(answer)) as client:
        found = client.batch(rows, concurrency=2)
    assert [one.error or one.text for one in found] == [
        "one",
        "two",
        "no such thing",
        "expected a JSON object, got int",
        "one",
    ]
    assert [one.status for one in found] == [200, 200, 400, None, 200] and asyncio.run(waiting()) == found

    async def in_a_notebook():
        with Client(transport=httpx.MockTransport(answer)) as client:
            return client.batch(rows)

    assert asyncio.run(in_a_notebook()) == found


def test_rows_in_memory_that_cannot_be_asked_say_why():
    def answer(request):
        raise httpx.ConnectError("refused")

    async def go():
        async with AsyncClient(transport=httpx.MockTransport(answer), max_retries=0) as client:
            return await run_rows([{"prompt": "hi", "model": "m"}], client, BatchOptions(attempts=1))

    (one,) = asyncio.run(go())
    assert "refused" in one.error
    with pytest.raises(APIError, match="refused"):
        print(one.text)


def test_files_by_the_clients(tmp_path):
    source, server = write(tmp_path / "in", [row(i) for i in range(3)]), Server(lambda *_: 200)

    async def waiting():
        async with AsyncClient(transport=httpx.MockTransport(server)) as client:
            return await client.batch_files([source, write(tmp_path / "more", [row(7)])], tmp_path / "out")

    seen = []
    with Client(transport=httpx.MockTransport(server)) as client:
        first = client.batch_files(str(source), tmp_path / "out", progress=lambda state: seen.append(state.completed))
    assert (first.completed, seen) == (3, [0, 1, 2, 3])
    assert (asyncio.run(waiting()).completed, len(list(read_results(tmp_path / "out")))) == (1, 4)


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
