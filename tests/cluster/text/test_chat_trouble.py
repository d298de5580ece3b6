"""What is wrong with a model's chat templates is found before a chat asks."""

from __future__ import annotations

import pytest

from isotherm.cluster.text.chat_template import ChatTemplate
from isotherm.cluster.text.chat_trouble import chat_trouble

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOS = {"bos_token": "<s>"}


@pytest.mark.parametrize(("templates", "tokens", "words"), [
    ({"default": PLAIN}, {}, []),
    ({"default": "{{ bos_token + messages[0].content }}{{ eos_token }}"}, BOS, []),
    ({"default": "{% if %}"}, BOS, ["the model's chat template does not compile: "]),
    ({"default": "{{ bos_token + messages[0].content }}"}, {}, ["even a plain message: ", "wants bos_token, which"]),
    ({"default": "{{ messages[0].content.nothing() }}"}, {}, ["cannot tell even a plain message: "]),
    ({"default": "{{ bos_token }}" + PLAIN}, {}, ["begins with bos_token", "prompts lack it"]),
    ({"default": PLAIN, "tool_use": "{{ tools[0].function.name + 1 }}"}, {}, ["(template tool_use) the model's"]),
    # One for a purpose of its own may refuse a plain message, and must compile.
    ({"default": PLAIN, "rag": "{{ documents[0].text + 1 }}"}, {}, []),
    ({"default": PLAIN, "rag": "{% for %}"}, {}, ["(template rag) the model's chat template does not compile"]),
    ({"rag": PLAIN}, {}, ["several chat templates (rag) and none named 'default'"]),
    ({"default": ENDLESS}, {}, ["more than 0.5 s"]),
])  # fmt: skip
def test_each_kind_of_trouble_is_said_and_nothing_else(templates, tokens, words):
    template = ChatTemplate(templates, special_tokens=tokens, time_limit=0.5 if ENDLESS in templates.values() else 20)
    found = chat_trouble(template)
    template.close()
    assert len(found) == (1 if words else 0), found
    assert all(word in found[0] for word in words), found
