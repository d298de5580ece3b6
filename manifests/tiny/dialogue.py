"""A training document as text: special tokens, the chat template, and messages.

A document is a `Doc`: either chat messages, rendered with CHAT_TEMPLATE exactly as a server renders them, or raw text.
"""

from __future__ import annotations

import json
import pathlib
import random
import re
from dataclasses import dataclass, field
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
TOOL_SPECIALS = [
    "tool▁calls▁begin",
    "tool▁call▁begin",
    "tool▁sep",
    "tool▁call▁end",
    "tool▁calls▁end",
    "tool▁outputs▁begin",
    "tool▁output▁begin",
    "tool▁output▁end",
    "tool▁outputs▁end",
]
PAD = "<｜▁pad▁｜>"
SPECIALS = [BOS, EOS, PAD, USER, ASSISTANT, *(f"<｜{name}｜>" for name in TOOL_SPECIALS), THINK, END_THINK]

# DeepSeek-V3.1's layout, less its `</think>` after <｜Assistant｜> when thinking is off: this model may open <think> by
# itself when asked.
CHAT_TEMPLATE = (pathlib.Path(__file__).parent / "chat_template.jinja").read_text()
_jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
_jinja.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
_template = _jinja.from_string(CHAT_TEMPLATE)


def sent_json(r: random.Random, value: Any) -> str:
    """As programs send it: as Python writes it, without a space as JavaScript does, or in lines."""
    kind = r.random()
    if kind < 0.3:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return json.dumps(value, ensure_ascii=False, indent=2 if kind < 0.36 else None)


MARKED = re.compile("\x02([^\x02\x03]*)\x03")


def letterwise(text: str) -> str:
    """A part of an answer that is to have a token for each of its characters, marked so."""
    return f"\x02{text}\x03" if text else text


def unmarked(text: str) -> str:
    """The same text as a reader sees it."""
    return text.replace("\x02", "").replace("\x03", "")


@dataclass
class Doc:
    """One training document. `task` is the row of the table of accuracies that it counts for; `exact` marks answers
    with one right wording, which the evaluation may compare. Where the prompt opens `<think>`, it `thinks`; where a
    grammar holds the answer to a JSON schema, it is `held`, and only values are its own. `kind`: how it was made."""

    task: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    exact: bool = False
    thinks: bool = False
    held: bool = False
    kind: str = ""

    def render(self) -> str:
        """The document's text with its special tokens, `BOS` first and `EOS` last."""
        return unmarked(self._marked())

    def letterwise(self) -> list[tuple[int, int]]:
        """Spans of the rendered text that `letterwise` marks."""
        out, marks = [], 0
        for mark in MARKED.finditer(self._marked()):
            out.append((mark.start() - marks, mark.end() - marks - 2))
            marks += 2
        return out

    def _marked(self) -> str:
        if self.text is not None:
            return BOS + self.text + EOS
        return _template.render(
            messages=self.messages, tools=self.tools, bos_token=BOS, eos_token=EOS, keep_thinking=True
        )

    def given(self) -> list[tuple[int, int]]:
        """Spans of the rendered text that the grammar writes: braces, keys and what stands between values."""
        if not self.held:
            return []
        text = self.render()
        start = text.rindex(ASSISTANT) + len(ASSISTANT)
        end = text.index(EOS, start)
        marks = re.finditer(r'[{,] ?"[^"]*": |}', text[start:end])
        return [(start + m.start(), start + m.end()) for m in marks]

    def value_ends(self) -> list[int]:
        """Where in the rendered text the grammar goes on after a value, for it cannot tell that a number is whole."""
        if not self.held:  # rendering takes time
            return []
        text = self.render()
        return [start for start, _ in self.given() if text[start] != "{"]


def prompt(messages: list[dict[str, Any]], **options: Any) -> str:
    """The text a server sends for `messages`; options are the template's (`tools`, `thinking`)."""
    return _template.render(messages=messages, bos_token=BOS, eos_token=EOS, add_generation_prompt=True, **options)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, tool_calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"tool_calls": tool_calls} if tool_calls else {})
