"""DeepSeek-V3.2's encoding of messages, against a statement of its rules in plain Python."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from fake_engine import write_tokenizer

from isotherm.cluster.text.chat_template import ChatTemplate, ChatTemplateError
from isotherm.cluster.text.deepseek_v32_template import TEMPLATE
from isotherm.cluster.text.template_traits import TemplateTraits
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.cluster.text.tokenizer_files import described
from isotherm.cluster.text.tool_formats.registry import shown_format

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
D = "｜DSML｜"
TOOLS_HEAD = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{D}function_calls>" block like the following as part of your reply to the user:
<{D}function_calls>
<{D}invoke name="$FUNCTION_NAME">
<{D}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{D}parameter>
...
</{D}invoke>
<{D}invoke name="$FUNCTION_NAME2">
...
</{D}invoke>
</{D}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

<{D}function_calls>
...
</{D}function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
"""


def stated(messages: list[dict[str, Any]], tools: list[Any] | None, thinking: bool) -> str:
    """The rules, message by message."""
    said_tools = ""
    if tools:
        functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        said_tools = f"\n\n{TOOLS_HEAD}{functions}\n</functions>\n"
    asked = [i for i, m in enumerate(messages) if m["role"] in ("user", "developer")]
    last = asked[-1] if asked else -1
    systems = [i for i, m in enumerate(messages) if m["role"] == "system"]
    out = BOS + ("" if systems else said_tools)
    for i, m in enumerate(messages):
        open_or_closed = "<think>" if thinking and i >= last else "</think>"
        if m["role"] == "system":
            out += m["content"] + (said_tools if i == systems[0] else "")
        elif m["role"] == "user":
            out += f"<｜User｜>{m['content']}<｜Assistant｜>{open_or_closed}"
        elif m["role"] == "developer":
            if not thinking or i >= last:
                out += f"<｜User｜>\n\n# The user's message is: {m['content']}<｜Assistant｜>{open_or_closed}"
        elif m["role"] == "assistant":
            if thinking and i > last:
                out += m.get("reasoning_content", "") + "</think>"
            out += m.get("content", "")
            if calls := m.get("tool_calls"):
                out += f"\n\n<{D}function_calls>\n"
                out += "\n".join(call_text(call["function"]) for call in calls) + f"\n</{D}function_calls>"
            out += EOS
        else:
            owner = max(j for j in range(i) if messages[j]["role"] == "assistant")
            order, count = i - owner, len(messages[owner]["tool_calls"])
            out += "\n\n<function_results>" if order == 1 else ""
            out += f"\n<result>{m['content']}</result>"
            out += f"\n</function_results>\n\n{open_or_closed}" if order == count else ""
    return out


def call_text(function: dict[str, Any]) -> str:
    lines = [
        f'<{D}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}</{D}parameter>"
        for key, value in function["arguments"].items()
    ]
    return f'<{D}invoke name="{function["name"]}">\n' + "\n".join(lines) + f"\n</{D}invoke>"


@pytest.fixture(scope="module")
def traits() -> TemplateTraits:
    template = ChatTemplate({"default": TEMPLATE}, special_tokens={"bos_token": BOS, "eos_token": EOS})
    return TemplateTraits(template, "default")


TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "für «Städte»",
                                      "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip


def random_chat(draw: random.Random) -> list[dict[str, Any]]:
    words = ["Hi", "", "a <b> & 'c'", "Grüße, 世界", "two\nlines ", "{{ no }}"]
    messages: list[dict[str, Any]] = []
    if draw.random() < 0.6:
        messages.append({"role": "system", "content": draw.choice(words)})
    for _ in range(draw.randint(1, 4)):
        messages.append(
            {"role": draw.choice(["user", "user", "user", "developer"]), "content": draw.choice(words) + "."}
        )
        for _ in range(draw.randint(0, 2)):
            count = draw.randint(1, 3)
            values = [{}, {"city": "Rom"}, {"n": 3, "deep": {"a": [1, "é", None]}, "yes": True}]
            calls = [
                {"type": "function", "function": {"name": "now", "arguments": draw.choice(values)}}
                for _ in range(count)
            ]
            said = {"content": draw.choice(words), "reasoning_content": draw.choice(words)}
            messages.append({"role": "assistant", **said, "tool_calls": calls})
            messages += [{"role": "tool", "content": draw.choice(words)} for _ in range(count)]
        if draw.random() < 0.7:
            messages.append(
                {"role": "assistant", "content": draw.choice(words), "reasoning_content": draw.choice(words)}
            )
    if messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": "And?"})
    return messages


@pytest.mark.parametrize("number", range(60))
def test_random_chats(traits: TemplateTraits, number: int):
    draw = random.Random(number)
    messages, tools, thinking = random_chat(draw), draw.choice([None, TOOLS]), draw.random() < 0.5
    context = {"messages": messages, "tools": tools, "add_generation_prompt": True, "thinking": thinking}
    assert traits.render(context).text == stated(messages, tools, thinking)


def test_without_a_generation_prompt_the_end_is_the_message(traits: TemplateTraits):
    context = {"messages": [{"role": "user", "content": "Hi"}], "tools": None, "add_generation_prompt": False}
    assert traits.render(context).text == f"{BOS}<｜User｜>Hi"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "content": "of no call"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm"}, {"role": "tool", "content": "x"}],
        [{"role": "critic", "content": "Hm"}],
    ],
)
def test_what_has_no_encoding_is_refused(traits: TemplateTraits, messages: list[dict[str, Any]]):
    with pytest.raises(ChatTemplateError):
        traits.render({"messages": messages, "tools": None, "add_generation_prompt": True})


def test_its_traits_are_found_out_like_any_template_s(traits: TemplateTraits):
    assert traits.supports_tools and traits.knows_thoughts and traits.thinking_switches == ("thinking",)
    assert traits.call_form.arguments == "object"
    form = shown_format(TEMPLATE)
    assert form is not None and form.name == "deepseek_v3.2"


def test_a_checkpoint_without_a_template_has_it(tmp_path: Path):
    write_tokenizer(tmp_path, chat_template=None)
    assert described(tmp_path).template_from == "none" and Tokenizer.load(tmp_path).chat_template is None
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v32"}')
    assert described(tmp_path).template_from.startswith("Isotherm's own") and described(tmp_path).template == TEMPLATE
    tokenizer = Tokenizer.load(tmp_path)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hi"}], template_kwargs={"thinking": True})
    assert prompt.in_thought and prompt.text.endswith("<｜User｜>Hi<｜Assistant｜><think>")
    prompt = tokenizer.encode_chat([{"role": "user", "content": "a</think>"}, {"role": "assistant", "content": "So"}],
                                   continue_final_message=True)  # fmt: skip
    assert not prompt.in_thought and prompt.text.endswith("<｜Assistant｜></think>So")
    (tmp_path / "chat_template.jinja").write_text("of its own")
    assert described(tmp_path).template == "of its own"
