"""A front door over an engine that says what it is told, with a template that shows all of a chat: what the engine was
asked is plain to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fake_engine import FakeEngine, http_server, write_tokenizer

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.text.tokenizer import Tokenizer

MODEL = "org/model"
EOS_ID = 1
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}{{ ' ' + m.tool_call_id if m.tool_call_id }}]"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<{{ c.id }} {{ c.function.name }} {{ c.function.arguments }}>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% if thinking %}<think>{% endif %}{% endif %}"
)


def written_call(name: str, arguments: str) -> str:
    """As a model writes it that calls tools in the form of `scripted_server`."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def load_tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(directory, chat_template=TEMPLATE))


class Scripted(FakeEngine):
    """Says `words`, and then the end of sequence."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer.vocab_size)
        self.tokenizer = tokenizer

    def say(self, words: str) -> None:
        self.script = [*self.tokenizer.encode(words, add_special_tokens=False), EOS_ID]

    @property
    def prompt(self) -> str:
        """The text of the last request."""
        return self.tokenizer.decode(self.seen[-1].prompt, skip_special_tokens=False)


@contextmanager
def scripted_server(engine: Scripted, settings: AppSettings | None = None) -> Iterator[str]:
    """Its base URL."""
    settings = replace(settings or AppSettings(), tool_format="hermes")
    with http_server(build_app(engine, engine.tokenizer, MODEL, ["claude-x"], settings)) as url:
        yield url
