"""Every example of docs/client.md runs, as it stands there, in the order in which a reader meets it."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, http_server, write_tokenizer

from isotherm.cluster.api.app import build_app
from isotherm.cluster.client import Client
from isotherm.cluster.messages.feed import FeedPart, FeedTable
from isotherm.cluster.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[1] / "docs" / "client.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
URL = "http://127.0.0.1:8000"


class Admin:
    """Each look at an operation finds it a phase further. Nothing happens before one has begun."""

    def __init__(self) -> None:
        self.looks, self.begun = 0, False
        self.feed = FeedTable("epoch")

    def _operation(self) -> dict[str, Any]:
        self.looks += 1
        now = time.time()
        entered = {f"phase {i}": now + i for i in range(self.looks)} | {"done": now}
        return {"id": "op-1", "phase": "done", "entered": entered}

    async def operate(self, body: Any) -> dict[str, Any]:
        self.begun = True
        return self._operation()

    async def operation(self, operation_id: str) -> dict[str, Any]:
        return self._operation()

    async def operation_history(self) -> list[dict[str, Any]]:
        return [self._operation()]

    async def feed_part(self, last: str) -> FeedPart | None:
        if last != "":
            await asyncio.sleep(0.02)
        self.feed.put("cluster", {"state": "running"})
        if self.begun:
            self.feed.put("operation/op-1", {**self._operation(), "created": 0.0})
        return self.feed.since(last)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    app = build_app(FakeEngine(tokenizer.vocab_size), tokenizer, "m", admin=Admin())
    with http_server(app) as url:
        yield url
    tokenizer.chat_template.close()


def test_all_examples_run(url, capsys):
    """Typed answers and tools by the bundled model: the fake one gives neither."""
    assert len(BLOCKS) >= 8
    names: dict[str, Any] = {}
    with Client.local("tiny") as tiny:
        for block in BLOCKS:
            given = names.get("client")
            if "parse(" in block or "tools=" in block:
                names["client"] = tiny
            exec(compile(block.replace(URL, url), str(PAGE), "exec"), names)
            if given is not None:
                names["client"] = given
    names["client"].close()
    assert type(names["answer"]).__name__ == "Sum" and names["answer"].first == 3
    assert names["messages"][-1]["content"] == "sunny in Oslo"
    assert "3 + 4 = 7." in capsys.readouterr().out  # of the engine in this process
