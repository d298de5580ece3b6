from __future__ import annotations

from pathlib import Path

import pytest
from chat_templates import GLM, HERMES, QWEN3_CODER

from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.cluster.text.tool_formats.registry import CHOICES, TOOL_FORMATS, chosen_format, shown_format

# The part of each model's published template that writes a call of an earlier turn, shortened to it.
TEMPLATES = {
    "deepseek_v3": (
        "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + "
        "tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] + '\\n```<｜tool▁call▁end｜>'}}"
    ),
    "deepseek_v3.1": (
        "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>' + "
        "tool['function']['arguments'] + '<｜tool▁call▁end｜>'}}"
    ),
    "deepseek_v3.2": "{{ '<｜DSML｜invoke name=\"' + tool.function.name + '\">\\n' }}",
    "kimi_k2": "<|tool_calls_section_begin|>{%- for tool_call in message['tool_calls'] -%}<|tool_call_begin|>",
    "glm4": "{{ '\\n<tool_call>' + tc.name }}\\n<arg_key>{{ k }}</arg_key>\\n<arg_value>{{ v }}</arg_value>",
    "qwen3_coder": (
        "{{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}{{- '<parameter=' + args_name + '>\\n' }}"
    ),
    "hermes": '{{- \'<tool_call>\\n{"name": "\' }}{{- tool_call.name }}',
}


def test_each_template_shows_its_format():
    assert {name: shown_format(text).name for name, text in TEMPLATES.items()} == {name: name for name in TOOL_FORMATS}
    whole = {"glm4": GLM, "qwen3_coder": QWEN3_CODER, "hermes": HERMES}
    assert {name: shown_format(text).name for name, text in whole.items()} == {name: name for name in whole}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{% if tools %}{{ tools | tojson }}{% endif %}",
        "<tool_call>\n<function={{ name }}>\n{{ arguments | tojson }}",
        "<seed:tool_call>\n<function={{ name }}>\n<parameter=",  # Seed-OSS'
        '{"name": {{ name }}, "parameters":',  # Llama's
    ],
)
def test_other_templates_show_none(text):
    assert shown_format(text) is None


def test_the_bundled_models():
    tiny = Tokenizer.load(Path(__file__).resolve().parents[4] / "manifests" / "tiny")
    assert shown_format(tiny.tool_template).name == "deepseek_v3.1"


def test_a_choice_comes_before_what_is_shown():
    assert CHOICES[0] == "auto" and CHOICES[-1] == "none" and set(CHOICES[1:-1]) == set(TOOL_FORMATS)
    assert chosen_format("auto", TEMPLATES["glm4"]).name == "glm4"
    assert chosen_format("hermes", TEMPLATES["glm4"]).name == "hermes"
    assert chosen_format("none", TEMPLATES["glm4"]) is None
