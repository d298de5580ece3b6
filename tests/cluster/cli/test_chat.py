from __future__ import annotations

import io

import pytest
from fake_engine import EOS, FakeEngine, http_server, write_tokenizer
from rich.console import Console

from isotherm.cluster.api.app import build_app
from isotherm.cluster.cli.chat import chat_loop
from isotherm.cluster.text.tokenizer import Tokenizer


def test_a_thought_is_shown_and_not_said_again(tmp_path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    engine = FakeEngine(tokenizer.vocab_size, script=tokenizer.encode(f"<think>hm</think>7{EOS}", False))
    lines = iter(["hello", "again"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    out = io.StringIO()
    with http_server(build_app(engine, tokenizer, "m")) as url:
        chat_loop(url, None, 0.0, 100, Console(file=out))
    tokenizer.chat_template.close()  # type: ignore[union-attr]
    assert out.getvalue().count("hm\n7\n") == 2
    second = tokenizer.decode(engine.seen[1].prompt)
    assert second == "<User>hello<Assistant>7<User>again<Assistant>"
