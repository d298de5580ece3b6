from __future__ import annotations

import json

import pytest
from scripted import load_tokenizer

from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.prepare import OPENAI_DEFAULTS, PromptLimits, Served
from isotherm.cluster.api.prepare_messages import prepare_messages

LIMITS = PromptLimits(max_model_len=400, vocab_size=1000, max_prompt_chars=5000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    loaded = load_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    yield loaded
    loaded.chat_template.close()


def prepared(tokenizer, max_tokens, **defaults):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": max_tokens}
    served = Served({"m"}, tokenizer, LIMITS, {**OPENAI_DEFAULTS, **defaults})
    return prepare_messages(json.dumps(body).encode(), "id", served)


def test_the_output_is_what_is_asked_for_or_what_fits(tokenizer):
    assert prepared(tokenizer, 20).requests[0].params.max_tokens == 20
    request = prepared(tokenizer, 10_000).requests[0]
    assert request.params.max_tokens == 400 - len(request.prompt)


def test_an_output_shorter_than_it_must_be_is_refused(tokenizer):
    assert prepared(tokenizer, 20, min_tokens=20).requests[0].params.min_tokens == 20
    with pytest.raises(ReplyError, match="min_tokens: 21 are more than the 20 that the output may have") as info:
        prepared(tokenizer, 20, min_tokens=21)
    assert info.value.param == "min_tokens"
