"""Sampling fields with the bundled model: what the fake engine cannot tell, whether the numbers are true."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import pytest
from local_client import TINY, LocalClient

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.prepare import choice_seed
from isotherm.cluster.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time there was a"
EOS_TEXT = "<｜end▁of▁sentence｜>"


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


def post(app, path, **fields):
    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(path, json={"model": "tiny", **fields})

    answer = asyncio.run(go())
    assert answer.status_code == 200, answer.text
    return answer


def complete(app, **fields):
    asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    return post(app, "/v1/completions", **asked).json()


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
    asked = {"prompt": prompt, "temperature": 2, "seed": 11, "max_tokens": 4}  # few would be likely at 1
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


# --- every field beside every other ---------------------------------------------------------------

SAMPLING = {
    "n": [2, 5],
    "temperature": [0.7, 1.5],
    "top_p": [0, 0.8],
    "top_k": [1, 20],
    "min_p": [0.05],
    "stop": ["a", [" the", "e s"], EOS_TEXT],
    "include_stop_str_in_output": [True],
    "logit_bias": [{"300": 5, "301": -100}],
    "bad_words": [["the", "a"]],
    "frequency_penalty": [0.5],
    "repetition_penalty": [1.3],
    "min_tokens": [6],
    "ignore_eos": [False],
    "skip_special_tokens": [False],
    "return_token_ids": [True],
}
COMPLETION = {
    **SAMPLING,
    "prompt": [[5, 6, 7, 300, 301], ["Once upon", "The cat"], EOS_TEXT + "One day"],
    "logprobs": [0, 3],
    "echo": [True],
    "best_of": [5],
    "prompt_logprobs": [1],
    "add_special_tokens": [False],
}
CHAT = {**SAMPLING, "logprobs": [True], "prompt_logprobs": [0]}


def told(choices, chat):
    """Of each choice what whole replies and streams have alike."""
    out = {}
    for choice in choices:
        have = out.setdefault(choice["index"], {"text": "", "ids": [], "logprobs": {}, "finish": None})
        part = choice.get("message") or choice.get("delta") or {} if chat else choice
        have["text"] += part.get("content" if chat else "text") or ""
        have["ids"] += choice.get("token_ids") or []
        for key, values in (choice["logprobs"] or {}).items():
            have["logprobs"].setdefault(key, []).extend(values or [])
        have["finish"] = choice["finish_reason"] or have["finish"]
    return out


@pytest.mark.parametrize("seed", range(40))
def test_any_fields_work_together_and_a_stream_says_what_a_whole_reply_does(app, seed):
    rng = random.Random(seed)
    chat = seed % 4 == 0
    known = CHAT if chat else COMPLETION
    asked = {name: rng.choice(known[name]) for name in rng.sample(sorted(known), rng.randint(2, 8))}
    if "best_of" in asked:
        asked["n"] = 2
    base = {"messages": [{"role": "user", "content": "Tell me a story."}]} if chat else {"prompt": PROMPT}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    fields = {**base, "temperature": 1, "ignore_eos": True, "max_tokens": 14, "seed": seed, **asked}
    whole = post(app, path, **fields).json()
    wanted = told(whole["choices"], chat)
    assert sorted(wanted) == list(range(len(wanted)))
    for have in wanted.values():
        assert have["finish"] in ("length", "stop")
        assert not ("return_token_ids" in asked and not have["ids"])
        for values in have["logprobs"].values():
            assert len(values) in (0, max(map(len, have["logprobs"].values())))
    if "bad_words" in asked and "echo" not in asked and asked.get("n") is None and not chat:
        assert all("the" not in have["text"].split() for have in wanted.values())  # not "Isotherm"
    for name in ("best_of", "prompt_logprobs"):  # they have no form in a stream
        if name in asked:
            again = post(app, path, **fields).json()
            assert told(again["choices"], chat) == wanted
            return
    streamed = post(app, path, **fields, stream=True, stream_options={"include_usage": True}).text
    chunks = [json.loads(line[6:]) for line in streamed.split("\n\n") if line.startswith("data: {")]
    got = told([choice for chunk in chunks for choice in chunk["choices"]], chat)
    assert got == wanted, asked
    used = [chunk["usage"] for chunk in chunks if chunk.get("usage")][-1]
    assert used["completion_tokens"] == whole["usage"]["completion_tokens"]
