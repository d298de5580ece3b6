"""`isotherm generate` as a function: the engine's own tokens, text that grows as it is shown, and refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_checkpoint, make_config, make_tensors, write_checkpoint

from isotherm.actors.local import local_engine, run
from isotherm.cluster.cli.offline import OfflineError, OfflineOptions, generate_offline, sampling_asked
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.manifest import Manifest, parse_manifest
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.text.tokenizer import NoChatTemplateError, Tokenizer
from isotherm.cluster.text.tokenizer_files import TokenizerError
from isotherm.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.slow

PROMPT = (5, 250, 17, 99, 4, 123)
DEFAULTS = OfflineOptions(
    prompt=None, prompt_ids=None, chat=None, max_tokens=8, temperature=0.0, top_p=1.0, top_k=0, seed=0, ignore_eos=True,
    dtype="float32", kernels="reference", logprobs=None,
)  # fmt: skip
IDS = {"prompt_ids": ",".join(map(str, PROMPT))}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), {"max_position_embeddings": 64}, seed=3)


def generate(path: Path, manifest: Manifest | None = None, show: Any = None, **changes: Any) -> dict[str, Any]:
    return generate_offline(manifest or Manifest(), path, dataclasses.replace(DEFAULTS, **changes), show)


def engine_tokens(path: Path, **params: Any) -> list[int]:
    engine = local_engine(Checkpoint.open(path), ReferenceKernels(torch.float32), SchedulerConfig(16, 8, 512, 1, 64))
    return [
        t
        for delta in run(engine, [GenerationRequest("x", PROMPT, SamplingParams(8, **params))])
        for t in delta.token_ids
    ]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 2.0, "seed": 4, "top_k": 50, "top_p": 0.9}])
def test_tokens_are_the_engines(model: Path, params: dict[str, Any]):
    out = generate(model, **IDS, **params)
    assert out["token_ids"] == engine_tokens(model, **params)
    assert (out["text"], out["logprobs"], out["finish_reason"], out["prompt_tokens"]) == (None, None, "length", 6)


def test_it_notes_once_with_which_kernels(model: Path):
    noted: list[str] = []
    generate_offline(
        Manifest(), model, dataclasses.replace(DEFAULTS, prompt_ids="1,2,3", kernels="reference"), None, noted.append
    )
    assert noted == ["kernels: plain torch, as asked for"]


def test_the_kv_cache_is_kept_as_the_manifest_or_the_option_says(model: Path):
    """Sampled at a high temperature, so that rounded latents show in tokens."""
    options = {**IDS, "temperature": 2.0, "max_tokens": 40}
    plain, coded = generate(model, **options), generate(model, **options, kv_cache_dtype="fp8")
    assert plain["token_ids"] != coded["token_ids"] and plain["system_fingerprint"] != coded["system_fingerprint"]
    manifest = parse_manifest({"engine": {"kv_cache_dtype": "fp8"}})
    assert generate(model, manifest, **options) == coded
    assert generate(model, manifest, **options, kv_cache_dtype="auto") == plain


@pytest.mark.parametrize("fp8", [True, False])
def test_the_headers_decide_how_weights_are_read(tmp_path: Path, fp8: bool):
    """Whatever config.json says of quantisation, and whether or not it promises an MTP layer that is not there."""
    stored = make_tensors(make_config(fp8=fp8), 3, fp8=fp8)
    outs = []
    for claimed, mtp in ((True, 1), (False, 0)):
        config = make_config({"num_nextn_predict_layers": mtp}, fp8=claimed)
        outs.append(generate(write_checkpoint(tmp_path / str(claimed), config, stored), **IDS, logprobs=2))
    assert outs[0] == outs[1] and outs[0]["system_fingerprint"]


def test_the_manifests_chunking_changes_no_token(model: Path):
    small = parse_manifest({"engine": {"block_size": 1, "max_batch_tokens": 2}})
    assert generate(model, small, **IDS)["token_ids"] == engine_tokens(model, temperature=0.0)


@pytest.mark.slow
def test_it_stops_at_the_end_of_sequence_unless_told_to_go_on(tmp_path: Path):
    config = {"max_position_embeddings": 64}
    tokens = engine_tokens(make_checkpoint(tmp_path / "a", config, seed=3), temperature=0.0)
    path = make_checkpoint(tmp_path / "b", config | {"eos_token_id": [299, tokens[3]]}, seed=3)
    out = generate(path, **IDS, ignore_eos=False)
    assert out["token_ids"] == tokens[: tokens.index(tokens[3]) + 1] and out["finish_reason"] == "stop"
    assert generate(path, **IDS)["token_ids"] == tokens


@pytest.mark.parametrize("top", [0, 3, 300])
def test_logprobs_are_of_each_token(model: Path, top: int):
    out = generate(model, **IDS, logprobs=top)
    assert [entry["token_id"] for entry in out["logprobs"]] == out["token_ids"]
    assert all(len(entry["top"]) == top and entry["logprob"] <= 0 for entry in out["logprobs"])
    assert json.loads(json.dumps(out))["token_ids"] == out["token_ids"]


def test_prompt_and_output_may_fill_the_context_and_no_more(model: Path):
    assert len(generate(model, **IDS, max_tokens=58)["token_ids"]) == 58
    with pytest.raises(OfflineError, match="6 prompt tokens and --max-tokens 59 exceed the model's 64"):
        generate(model, **IDS, max_tokens=59)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "give one of"),
        ({"prompt": "a", "chat": "b"}, "give one of"),
        ({"prompt_ids": "1;2"}, '--prompt-ids is "1;2"'),
        ({"prompt_ids": "300"}, "ids 0 to 299"),
        ({**IDS, "logprobs": 301}, "--logprobs is 301; the vocabulary has 300"),
        ({**IDS, "dtype": "float16"}, '--dtype is "float16"'),
        ({**IDS, "kernels": "cuda"}, '--kernels is "cuda"'),
    ],
)
def test_options_that_do_not_fit_are_refused(model: Path, changes: dict[str, Any], words: str):
    with pytest.raises(OfflineError) as caught:
        generate(model, **changes)
    assert words in str(caught.value)


def test_text_needs_a_tokenizer(model: Path):
    for changes in ({"prompt": "a"}, {"chat": "a"}):
        with pytest.raises(TokenizerError):
            generate(model, **changes)


# --- with text ------------------------------------------------------------------------------------


def test_what_is_shown_adds_up_to_the_text():
    shown: list[str] = []
    out = generate(
        bundled_model(),
        show=shown.append,
        chat="What is 3 + 4?",
        max_tokens=40,
        ignore_eos=False,
        dtype="bfloat16",
        kernels="auto",
    )
    assert (
        "".join(shown) == out["text"]
        and "7" in out["text"]
        and len(shown) == len(out["token_ids"])
        and out["finish_reason"] == "stop"
    )
    assert out["text"] == Tokenizer.load(bundled_model()).decode(out["token_ids"])


def test_ids_and_the_text_they_stand_for_are_the_same_prompt():
    ids = Tokenizer.load(bundled_model()).encode("One, two, three,")
    by_ids = generate(bundled_model(), prompt_ids=",".join(map(str, ids)), dtype="bfloat16", kernels="auto")
    assert by_ids == generate(bundled_model(), prompt="One, two, three,", dtype="bfloat16", kernels="auto")
    assert by_ids["text"] and by_ids["prompt_tokens"] == len(ids)


def test_a_chat_needs_a_template(tmp_path: Path):
    for file in bundled_model().iterdir():
        if file.is_file() and file.name not in ("chat_template.jinja", "tokenizer_config.json"):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(NoChatTemplateError):
        generate(tmp_path, chat="hello")


def test_other_sampling_parameters_are_numbers_by_name():
    asked = sampling_asked(["min_p=0.05", "min_tokens=3", "repetition_penalty=1.1"])
    assert asked == {"min_p": 0.05, "min_tokens": 3, "repetition_penalty": 1.1}


@pytest.mark.parametrize("word", ["min_p", "min_p=a", "min_tokens=1.5", "temperature=1", "=3", "logit_bias=3"])
def test_what_is_no_sampling_parameter_is_refused(word):
    with pytest.raises(OfflineError, match="--sampling"):
        sampling_asked([word])


def test_they_are_the_engines_too(model: Path):
    asked = {"repetition_penalty": 1.9, "min_p": 0.5}
    out = generate(model, **IDS, temperature=2.0, sampling=asked)
    assert out["token_ids"] == engine_tokens(model, temperature=2.0, **asked)
    assert out["token_ids"] != engine_tokens(model, temperature=2.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": float("nan")}, "temperature is nan; it must be between 0 and 2"),
        ({"top_p": float("nan")}, "top_p is nan; it must be between 0 and 1"),
        ({"sampling": {"min_p": 5.0}}, "min_p is 5; it must be between 0 and 1"),
        ({"sampling": {"repetition_penalty": 0.0}}, "repetition_penalty is 0; it must be between 1e-06 and 2"),
        ({"sampling": {"presence_penalty": float("inf")}}, "presence_penalty is inf; it must be between -2 and 2"),
        ({"sampling": {"min_tokens": 9}}, "min_tokens is 9; it must be between 0 and 8"),
    ],
)
def test_numbers_have_the_ranges_that_requests_have(model: Path, changes: dict[str, Any], words: str):
    with pytest.raises(OfflineError) as caught:
        generate(model, **IDS, **changes)
    assert str(caught.value) == words
