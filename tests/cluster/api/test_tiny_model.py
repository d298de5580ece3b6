"""Sampling fields with the bundled model: what the fake engine cannot tell, whether the numbers are true."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from local_client import TINY, LocalClient

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.prepare import choice_seed
from isotherm.cluster.text.tokenizer import Tokenizer

PROMPT = "Once upon a time there was a"


@pytest.fixture(scope="module")
def tokenizer():
    loaded = Tokenizer.load(TINY)
    yield loaded
    loaded.chat_template.close()


@pytest.fixture(scope="module")
def engine():
    return LocalClient()


@pytest.fixture(scope="module")
def app(engine, tokenizer):
    return build_app(engine, tokenizer, "tiny")


def complete(app, **fields):
    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
            return await client.post("/v1/completions", json=body)

    answer = asyncio.run(go())
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_echoed_continuation_is_as_likely_as_when_it_was_generated(app, tokenizer):
    """What lm-eval reads: the tokens' log-probabilities, and whether each was the likeliest."""
    made = complete(app, logprobs=1, return_token_ids=True)["choices"][0]
    ids = [*made["prompt_token_ids"], *made["token_ids"]]
    (echoed,) = complete(app, prompt=ids, echo=True, logprobs=1, max_tokens=0)["choices"]
    told, length = echoed["logprobs"], len(made["prompt_token_ids"])
    assert echoed["text"] == tokenizer.decode(ids) and len(told["tokens"]) == len(ids)
    # Prompt tokens are computed in another form than generated ones, and round otherwise.
    assert told["token_logprobs"][length:] == pytest.approx(made["logprobs"]["token_logprobs"], abs=0.15)
    greedy = [
        logprob == max(top.values())
        for logprob, top in zip(told["token_logprobs"][length:], told["top_logprobs"][length:], strict=True)
    ]
    assert sum(greedy) >= len(greedy) - 1


def test_what_is_scored_is_the_same_over_a_warm_cache_and_beside_an_output(app):
    first = complete(app, echo=True, logprobs=3, max_tokens=0)["choices"][0]["logprobs"]
    again = complete(app, echo=True, logprobs=3)["choices"][0]["logprobs"]
    length = len(first["tokens"])
    assert {key: values[:length] for key, values in again.items()} == first


def test_sixteen_choices_compute_one_prompt_and_each_is_as_alone(app, engine, tokenizer):
    prompt = [7 + i % 90 for i in range(100)]
    asked = {"prompt": prompt, "temperature": 1, "seed": 11, "max_tokens": 4}
    before = engine.rows
    choices = complete(app, **asked, n=16)["choices"]
    # One token of output is sampled from the prompt's rows, and the others need a row each.
    assert engine.rows - before == 100 + 15 * (100 - 96) + 16 * 3
    for i in (0, 7, 15):
        alone = complete(app, **{**asked, "seed": choice_seed(11, i)})["choices"][0]
        assert alone["text"] == choices[i]["text"]
    assert len({choice["text"] for choice in choices}) > 8


def test_a_bad_word_is_never_written(app):
    text = complete(app, max_tokens=40)["choices"][0]["text"]
    word = text.split()[0]
    without = complete(app, max_tokens=40, bad_words=[word])["choices"][0]["text"]
    assert word in text and word not in without


def test_top_p_0_takes_the_likeliest(app):
    assert complete(app, temperature=1, top_p=0)["choices"][0]["text"] == complete(app)["choices"][0]["text"]


def test_the_best_of_eight_is_the_likeliest_on_average(app):
    asked = {"temperature": 1.5, "seed": 5, "logprobs": 0}
    every = complete(app, **asked, n=8)["choices"]
    best = complete(app, **asked, n=2, best_of=8)["choices"]
    mean = [sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"]) for c in every]
    order = sorted(range(8), key=lambda i: -mean[i])
    assert [choice["text"] for choice in best] == [every[i]["text"] for i in order[:2]]
