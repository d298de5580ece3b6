"""Every example of docs/client.md runs, as it stands there, in the order in which a reader meets it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, http_server, write_tokenizer

from isotherm.cluster.api.app import build_app
from isotherm.cluster.client import Client
from isotherm.cluster.text.tokenizer import Tokenizer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "client.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
URL = "http://127.0.0.1:8000"


class Admin:
    """Each look at an operation finds it a phase further."""

    def __init__(self) -> None:
        self.looks = 0

    def _operation(self) -> dict[str, Any]:
        self.looks += 1
        now = time.time()
        entered = {f"phase {i}": now + i for i in range(self.looks)} | {"done": now}
        return {"id": "op-1", "phase": "done", "entered": entered}

    async def operate(self, body: Any) -> dict[str, Any]:
        return self._operation()

    async def operation(self, operation_id: str) -> dict[str, Any]:
        return self._operation()

    async def operation_history(self) -> list[dict[str, Any]]:
        return [self._operation()]


def answer(request: httpx.Request) -> httpx.Response:
    """A model that writes JSON where it is to, and calls the first tool where there is one."""
    body = json.loads(request.content) if request.content else {}
    if request.method == "GET":
        return httpx.Response(200, json={"data": [{"id": "m"}]})
    message: dict[str, Any] = {"content": "It will be sunny."}
    if "response_format" in body:
        message = {"content": '{"terms": [3, 4], "total": 7}'}
    elif body.get("tools") and body["messages"][-1]["role"] == "user":
        function = {"name": body["tools"][0]["function"]["name"], "arguments": '{"city": "Oslo"}'}
        message = {"content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]}
    return httpx.Response(200, json={"choices": [{"message": message, "finish_reason": "stop"}]})


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    app = build_app(FakeEngine(tokenizer.vocab_size), tokenizer, "m", admin=Admin())
    with http_server(app) as url:
        yield url
    tokenizer.chat_template.close()


def test_all_examples_run(url, capsys):
    """Typed answers and tools by a scripted model: a fake one gives neither."""
    assert len(BLOCKS) >= 8
    names: dict[str, Any] = {}
    with Client(transport=httpx.MockTransport(answer)) as scripted:
        for block in BLOCKS:
            given = names.get("client")
            if "parse(" in block or "tools=" in block:
                names["client"] = scripted
            exec(compile(block.replace(URL, url), str(PAGE), "exec"), names)
            if given is not None:
                names["client"] = given
    names["client"].close()
    out = capsys.readouterr().out
    assert "3 + 4 = 7" in out  # of the engine in this process
    assert "\n7\n" in out and "It will be sunny." in out and "done\n" in out
