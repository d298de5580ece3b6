"""Every field that OpenAI, vLLM, SGLang and others know is honoured, refused by name, or listed as harmless."""

from __future__ import annotations

import json

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.completion import CompletionBody
from isotherm.cluster.api.bodies.unserved import HARMLESS
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.parse import checked

OPENAI = {
    ChatBody: {*chat_create_params.CompletionCreateParamsBase.__annotations__, "stream"},
    CompletionBody: {*completion_create_params.CompletionCreateParamsBase.__annotations__, "stream"},
}


def names(*lines: str) -> list[str]:
    return " ".join(lines).split()


# Of the two servers' request classes, beyond OpenAI's.
VLLM = names(
    "top_k min_p repetition_penalty stop_token_ids ignore_eos min_tokens skip_special_tokens priority prompt_logprobs",
    "include_stop_str_in_output response_format guided_json guided_regex guided_choice guided_grammar echo",
    "structured_outputs structural_tag guided_decoding_backend guided_whitespace_pattern return_token_ids request_id",
    "return_tokens_as_token_ids kv_transfer_params vllm_xargs repetition_detection flat_logprobs cache_salt",
    "skip_reading_prefix_cache watermarking truncate_prompt_tokens truncation_side session_id stream_interval",
    "ec_transfer_params routed_experts_prompt_start return_token_offsets return_mm_kwargs thinking_token_budget",
    "allowed_token_ids logprob_token_ids use_beam_search length_penalty spaces_between_special_tokens prompt_embeds",
)
VLLM_CHAT = names(
    "add_generation_prompt continue_final_message documents chat_template chat_template_kwargs mm_processor_kwargs",
    "include_reasoning tools tool_choice parallel_tool_calls media_io_kwargs return_prompt_text",
)
SGLANG = names(
    "top_k min_p min_tokens repetition_penalty regex ebnf json_schema stop_token_ids ignore_eos skip_special_tokens",
    "lora_path session_params return_hidden_states rid extra_key priority bootstrap_host bootstrap_port bootstrap_room",
    "data_parallel_rank custom_params return_cached_tokens_details return_routed_experts routed_experts_start_len",
    "routed_dp_rank disagg_prefill_dp_rank images_config ngram_corpus_id custom_labels session_id return_token_ids",
    "stop_regex no_stop_trim custom_logit_processor cache_salt input_ids sampling_params return_logprob",
)
SGLANG_CHAT = names(
    "separate_reasoning stream_reasoning continue_final_message chat_template_kwargs return_prompt_token_ids task",
    "return_meta_info max_dynamic_patch min_dynamic_patch use_audio_in_video",
)
LLAMA = names(  # of llama.cpp's
    "verbose timings_per_token cache_prompt return_tokens return_progress sse_ping_interval n_predict n_indent n_keep",
    "n_discard n_cmpl n_cache_reuse t_max_predict_ms response_fields top_n_sigma xtc_probability xtc_threshold",
    "typical_p dynatemp_range dynatemp_exponent repeat_last_n repeat_penalty dry_multiplier dry_base id_slot",
    "dry_allowed_length dry_penalty_last_n dry_sequence_breakers mirostat mirostat_tau mirostat_eta adaptive_target",
    "adaptive_decay n_probs min_keep backend_sampling post_sampling_probs lora json_schema grammar grammar_lazy",
    "chat_format reasoning_format generation_prompt parse_tool_calls chat_parser continue_final_message echo",
    "preserved_tokens grammar_triggers reasoning_control reasoning_budget_tokens reasoning_budget_start_tag",
    "reasoning_budget_end_tags reasoning_budget_message samplers",
)
OTHERS = [*LLAMA, *names("thinking enable_thinking reasoning thinking_budget")]
KNOWN = {
    ChatBody: {*OPENAI[ChatBody], *VLLM, *VLLM_CHAT, *SGLANG, *SGLANG_CHAT, *OTHERS},
    CompletionBody: {*OPENAI[CompletionBody], *VLLM, *SGLANG, *OTHERS},
}
MINIMAL = {
    ChatBody: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    CompletionBody: {"model": "m", "prompt": "x"},
}
bodies = pytest.mark.parametrize("body", [ChatBody, CompletionBody])


def is_refused(body, name):
    """By a rule of its own."""
    with pytest.raises(ReplyError) as info:
        checked(body, {**MINIMAL[body], name: {"some": "thing"}})
    return info.value.param == name


@bodies
def test_every_known_field_has_an_answer(body):
    assert len(KNOWN[body]) > 100
    answered = body.model_fields.keys() | body.neutral.keys() | body.harmless.keys() | body.renamed.keys()
    assert all(is_refused(body, name) for name in KNOWN[body] - answered)


@bodies
def test_refused_fields_are_refused_by_name_and_their_neutral_values_are_taken(body):
    for name, neutral in body.neutral.items():
        for value in ({"some": "thing"}, "something", ["x"], 17, 0.123):
            if value in neutral:
                continue
            with pytest.raises(ReplyError) as info:
                checked(body, {**MINIMAL[body], name: value})
            assert info.value.param is not None and info.value.param.startswith(name), (name, value)
            assert name in str(info.value)
        for value in (None, *neutral):
            json.dumps(value)  # it can be said in JSON
            checked(body, {**MINIMAL[body], name: value})


@bodies
def test_harmless_fields_are_taken_whatever_they_hold(body):
    assert not HARMLESS.keys() & (body.neutral.keys() | body.model_fields.keys())
    for name in HARMLESS:
        for value in (None, True, "x", {"a": "b"}):
            checked(body, {**MINIMAL[body], name: value})


@bodies
def test_a_field_that_a_body_has_is_not_refused(body):
    class Serves(body):
        lora_path: str | None = None

    assert "lora_path" in body.neutral and "lora_path" not in Serves.neutral
    assert checked(Serves, {**MINIMAL[body], "lora_path": "x"}).lora_path == "x"


def test_unknown_fields_are_ignored():
    for body in MINIMAL:
        checked(body, {**MINIMAL[body], "nobody_knows_this": {"a": 1}})
