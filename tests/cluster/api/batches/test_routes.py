"""/v1/files and /v1/batches as the unmodified openai client uses them, over a served fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import time

import httpx
import openai
import pytest
from fake_engine import http_server
from starlette.requests import Request

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.batches.service import PRIORITY, BatchLimits, BatchService
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.batches.upload import receive_file
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.settings import AppSettings

URL = "/v1/chat/completions"


@contextlib.contextmanager
def served(engine, tokenizer, folder, max_bytes=1 << 20, **limits):
    store = Store(folder, max_bytes, 100_000)
    app = build_app(engine, tokenizer, "m", batches=BatchService(store, BatchLimits(**limits), 100_000))
    with (
        http_server(app) as url,
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def row(custom_id, url=URL, **body):
    chat = {"model": "m", "messages": [{"role": "user", "content": custom_id}], "max_tokens": 4, "temperature": 0}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {**chat, **body}})


def upload(client, *rows, name="in.jsonl"):
    return client.files.create(file=(name, "\n".join(rows).encode()), purpose="batch")


def ended(client, batch_id, seconds=30.0):
    deadline = time.monotonic() + seconds
    while (batch := client.batches.retrieve(batch_id)).status not in ("completed", "failed", "cancelled", "expired"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def lines(client, file_id):
    return {line["custom_id"]: line for line in map(json.loads, client.files.content(file_id).text.splitlines())}


def test_the_whole_life_of_a_batch(engine, tokenizer, tmp_path):
    with served(engine, tokenizer, tmp_path) as client:
        file = upload(client, row("a"), row("b", n=2), row("c", max_tokens=-1), row("d", priority=7, model="nope"))
        assert (file.purpose, file.status, file.filename) == ("batch", "processed", "in.jsonl")
        made = client.batches.create(
            input_file_id=file.id, endpoint=URL, completion_window="24h", metadata={"why": "test"}
        )
        assert made.status == "validating" and made.metadata == {"why": "test"}
        batch = ended(client, made.id)
        assert batch.status == "completed" and batch.request_counts is not None and batch.usage is not None
        assert batch.request_counts.to_dict() == {"total": 4, "completed": 2, "failed": 2}
        good, bad = lines(client, batch.output_file_id), lines(client, batch.error_file_id)
        assert set(good) == {"a", "b"} and set(bad) == {"c", "d"}
        direct = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "a"}], max_tokens=4, temperature=0
        )
        answer = good["a"]["response"]["body"]
        assert answer["choices"][0]["message"]["content"] == direct.choices[0].message.content
        assert batch.usage.output_tokens == 12 and batch.usage.input_tokens > 0
        assert bad["c"]["response"]["body"]["error"]["param"] == "max_tokens"
        assert bad["d"]["response"]["status_code"] == 404 and bad["d"]["response"]["request_id"]
        # What people ask goes first.
        assert [request.priority for request in engine.seen] == [PRIORITY, PRIORITY, PRIORITY, 0]
        assert [one.id for one in client.batches.list()] == [batch.id]
        with pytest.raises(openai.ConflictError) as info:
            client.batches.cancel(batch.id)
        assert info.value.response.headers["x-should-retry"] == "false"
        assert {one.id for one in client.files.list()} == {file.id, batch.output_file_id, batch.error_file_id}
        assert [one.id for one in client.files.list(purpose="batch")] == [file.id]
        assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)


def test_a_batch_of_completions(engine, tokenizer, tmp_path):
    asked = json.dumps(
        {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "hello"}}
    )
    with served(engine, tokenizer, tmp_path) as client:
        made = client.batches.create(
            input_file_id=upload(client, asked).id, endpoint="/v1/completions", completion_window="1h"
        )
        batch = ended(client, made.id)
        assert lines(client, batch.output_file_id)["x"]["response"]["body"]["object"] == "text_completion"


def test_a_batch_of_responses(engine, tokenizer, tmp_path):
    body = {"model": "m", "input": "hello", "max_output_tokens": 3}
    asked = json.dumps({"custom_id": "x", "method": "POST", "url": "/v1/responses", "body": body})
    with served(engine, tokenizer, tmp_path) as client:
        made = client.batches.create(
            input_file_id=upload(client, asked).id, endpoint="/v1/responses", completion_window="1h"
        )
        batch = ended(client, made.id)
        assert lines(client, batch.output_file_id)["x"]["response"]["body"]["object"] == "response"
        assert batch.usage is not None and batch.usage.output_tokens == 3 and engine.seen[0].priority == PRIORITY


def test_what_is_wrong_with_the_file_is_said_by_line(engine, tokenizer, tmp_path):
    with served(engine, tokenizer, tmp_path) as client:
        file = upload(client, "\ufeff" + row("a"), "", row("a"), "{", row("b", url="/v1/completions"))
        batch = ended(client, client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h").id)
        assert batch.status == "failed" and batch.errors is not None and batch.errors.data is not None
        assert [(error.line, error.code) for error in batch.errors.data] == [
            (3, "duplicate_custom_id"),
            (4, "invalid_json_line"),
            (5, "invalid_url"),
        ]
        assert not engine.seen


def test_cancel(engine, tokenizer, tmp_path):
    engine.delay_s = 0.05
    with served(engine, tokenizer, tmp_path, concurrency=2) as client:
        file = upload(client, *(row(str(i), max_tokens=50) for i in range(30)))
        made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        while not engine.open:
            time.sleep(0.01)
        assert len(engine.open) <= 2
        with pytest.raises(openai.ConflictError, match="cancel it first"):
            client.files.delete(file.id)
        assert client.batches.cancel(made.id).status == "cancelling"
        assert ended(client, made.id).status == "cancelled" and not engine.open


def test_another_replica_goes_on_with_what_one_has_left(engine, tokenizer, tmp_path):
    """The second server stands for the replica that comes after one that has died: the first one's loop is gone."""
    engine.delay_s = 0.01
    with served(engine, tokenizer, tmp_path) as client:
        file = upload(client, *(row(str(i), max_tokens=20) for i in range(40)))
        made = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        while len(engine.seen) < 5:
            time.sleep(0.01)
    engine.delay_s = 0.0
    with served(engine, tokenizer, tmp_path) as client:
        client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        batch = ended(client, made.id)
        assert batch.request_counts is not None and batch.request_counts.completed == 40
        assert sorted(lines(client, batch.output_file_id)) == sorted(map(str, range(40)))


def test_pages(engine, tokenizer, tmp_path):
    with served(engine, tokenizer, tmp_path) as client:
        files = [upload(client, row("a"), name=f"{i}.jsonl").id for i in range(5)]
        assert {file.id for file in client.files.list(limit=2)} == set(files), "the client turns the pages"
        page = client.files.list(limit=2)
        assert len(page.data) == 2 and page.has_more
        assert [file.id for file in client.files.list(order="asc")] == [f.id for f in client.files.list()][::-1]
        for bad in ({"limit": 0}, {"limit": "1".zfill(9) + "0" * 5000}, {"after": "file-x"}, {"order": "up"}):
            with pytest.raises(openai.BadRequestError, match=next(iter(bad))):
                client.files.list(**bad)  # type: ignore[arg-type]


def test_requests_that_make_no_sense_are_refused(engine, tokenizer, tmp_path):
    with served(engine, tokenizer, tmp_path) as client:
        file = upload(client, row("a")).id
        for fields, param in (
            ({"input_file_id": "file-1"}, "input_file_id"),
            ({"endpoint": "/v1/embeddings"}, "endpoint"),
            ({"completion_window": "1y"}, "completion_window"),
            ({"metadata": {"a": 1}}, "metadata.a"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ):
            body: dict = {"input_file_id": file, "endpoint": URL, "completion_window": "24h", **fields}
            with pytest.raises(openai.APIStatusError) as info:
                client.batches.create(**body)
            assert info.value.param == param and info.value.status_code in (400, 404), fields
            assert info.value.body["message"].startswith(f"{param}: ")  # as they name it, whoever finds it
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve("batch_1")


def post(client, **kwargs):
    return httpx.post(f"{client.base_url}files", **kwargs)


def test_uploads_that_cannot_be_taken(engine, tokenizer, tmp_path):
    with served(engine, tokenizer, tmp_path, max_file_bytes=50_000) as client:
        file = {"file": ("a", b"x")}
        whole = {"files": file, "data": {"purpose": "batch"}}
        assert post(client, **whole).status_code == 200
        for change, status, param in (
            ({"data": {}}, 400, "purpose"),
            ({"data": {"purpose": "fine-tune"}}, 400, "purpose"),
            ({"files": {"file": (None, b"x")}}, 400, "file"),
            ({"files": {"other": ("a", b"x")}}, 400, "file"),
            ({"files": {"file": ("a", b"x" * 100_000)}}, 413, None),
            ({"data": {"purpose": "batch", "expires_after[anchor]": "now"}}, 400, "expires_after.anchor"),
            ({"data": {"purpose": "batch", "expires_after[seconds]": "5"}}, 400, "expires_after.seconds"),
            ({"headers": {"content-encoding": "gzip"}}, 415, "content-encoding"),
        ):
            answer = post(client, **{**whole, **change})
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), (change, answer.text)
        for kind, content, status in (
            ("multipart/form-data", b"x", 415),
            ("application/json", b"{}", 415),
            ("multipart/form-data; boundary=a", b"x", 400),
            ("multipart/form-data; boundary=a", b"--a\r\n\r\n\r\n--a--", 400),
            ("multipart/form-data; boundary=" + "a" * 300, b"--a", 400),
            ("multipart/form-data; boundary=", b"--a", 400),
        ):
            answer = post(client, content=content, headers={"content-type": kind})
            assert answer.status_code == status and "message" in answer.json()["error"], (kind, answer.text)

        def endless():
            while True:
                yield b'--a\r\ncontent-disposition: form-data; name="file"; filename="b"\r\n\r\n' + b"x" * 9000

        answer = post(client, content=endless(), headers={"content-type": "multipart/form-data; boundary=a"})
        assert answer.status_code in (400, 413)
        full = post(client, **{**whole, "files": {"file": ("a", b"x")}})
        assert full.status_code == 200 and len(client.files.list().data) == 2
        assert not list((tmp_path / "uploads").iterdir())


def test_batches_take_room_too(engine, tokenizer, tmp_path):
    with served(engine, tokenizer, tmp_path, max_bytes=20_000) as client:
        file, made = upload(client, "{"), 0
        with pytest.raises(openai.APIStatusError, match="batch: .* delete files") as info:
            while made < 100:
                metadata = {str(i): "x" * 512 for i in range(16)}
                client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h", metadata=metadata)
                made += 1
        assert (info.value.status_code, info.value.code, info.value.param) == (413, "storage_full", None)
        assert made in (1, 2), "of 8 KiB each, and what is wrong with them where that is found meanwhile"


def test_what_a_full_disk_does_not_take_is_507_and_leaves_nothing(engine, tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def refused(call, **fields):
        with pytest.raises(openai.InternalServerError, match="the server's disk is full") as info:
            call(**fields)
        error = info.value
        assert (error.status_code, error.code, error.type) == (507, "storage_full", "server_error")
        assert error.response.headers["x-should-retry"] == "false"
        assert sorted(tmp_path.rglob("*")) == before

    with served(engine, tokenizer, tmp_path) as client:
        asked = {"input_file_id": upload(client, row("a")).id, "endpoint": URL, "completion_window": "24h"}
        engine.delay_s = 60.0
        made = client.batches.create(**asked)
        while not engine.open:
            time.sleep(0.01)
        before = sorted(tmp_path.rglob("*"))
        for place in ("batches.stored.write", "batches.upload.shutil.copyfileobj"):
            with monkeypatch.context() as patch:
                patch.setattr(f"isotherm.cluster.api.{place}", full)
                refused(lambda: upload(client, row("a")))
        with monkeypatch.context() as patch:
            patch.setattr("isotherm.cluster.api.batches.stored.write", full)
            refused(client.batches.create, **asked)
            patch.setattr("pathlib.Path.touch", full)
            refused(lambda: client.batches.cancel(made.id))
        assert client.batches.cancel(made.id).status == "cancelling"


def test_an_upload_of_unknown_length_finds_no_more_room_than_others(tmp_path):
    """Before all of it lies in a temporary file."""
    store, came = Store(tmp_path, 50_000, 100_000), 0
    head = b'--a\r\ncontent-disposition: form-data; name="file"; filename="b"\r\n\r\n'
    end = b'\r\n--a\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--a--'

    def upload_of(parts):
        nonlocal came
        content = iter([head, *[b"x" * 1000] * parts, end])
        came = 0

        async def receive():
            nonlocal came
            came += 1
            part = next(content, b"")
            return {"type": "http.request", "body": part, "more_body": bool(part)}

        headers = [(b"content-type", b"multipart/form-data; boundary=a")]
        request = Request({"type": "http", "method": "POST", "path": "/v1/files", "headers": headers}, receive)
        return asyncio.run(receive_file(request, store, 1 << 20))

    assert upload_of(20)["bytes"] == 20_000
    with pytest.raises(ReplyError) as info:
        upload_of(1000)
    assert (info.value.status, info.value.code) == (413, "storage_full") and came < 40
    assert upload_of(20)["bytes"] == 20_000, "nothing is held any more"


def test_a_server_without_a_common_folder_says_so(engine, tokenizer):
    app = build_app(engine, tokenizer, "m", settings=AppSettings(batches_refused="two replicas"))
    with http_server(app) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        for call in (client.files.list, client.batches.list, lambda: client.batches.retrieve("batch_1")):
            with pytest.raises(openai.InternalServerError, match="two replicas") as info:
                call()
            assert info.value.status_code == 501
            assert info.value.response.headers["x-should-retry"] == "false", "their clients would ask again"
    with http_server(build_app(engine, tokenizer, "m")) as url:
        assert httpx.get(url + "/v1/files").status_code == 404
