from __future__ import annotations

import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import EOS, FakeEngine, http_server, write_tokenizer
from rich.console import Console

from isotherm.cluster.api.app import build_app
from isotherm.cluster.cli import chat as module
from isotherm.cluster.cli.chat import chat_loop
from isotherm.cluster.text.tokenizer import Tokenizer


class _Says:
    """A client to whom one answer is said."""

    def __init__(self, text: str) -> None:
        self._text = text

    def chat(self, messages: Any, **_: Any) -> Iterator[Any]:
        yield SimpleNamespace(text="", reasoning=self._text, finish_reason=None)
        yield SimpleNamespace(text=self._text, reasoning="", finish_reason="stop")


def shown(text: str, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, color_system=None, emoji=False)
    client: Any = _Says(text)
    assert module._answer(client, {"messages": [], "max_tokens": 9}, console) == text
    return out.getvalue()


def test_what_the_model_says_is_shown_as_it_is_and_gives_a_terminal_no_orders():
    text = "a[1:x:2] :smile: b\n"
    assert shown(text, True) == shown(text, False) == f"{text}\n{text}\n"
    clipboard = "\x1b]52;c;ZXZpbA==\x07 \x9b2J \x7f"
    assert not set("\x1b\x07\x9b\x7f") & set(shown(clipboard, True)) and "\N{REPLACEMENT CHARACTER}]52" in shown(
        clipboard, True
    )
    assert "\x1b]52" in shown(clipboard, False), "a file has what was said"


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
