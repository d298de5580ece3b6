"""Fields of other servers' sampling that have another name here, or that are not served: each is refused by name unless
it asks for nothing."""

from __future__ import annotations

from typing import Any

# Field → the values that ask for nothing, and what to give instead.
OTHER_NAMES: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_new_tokens": ((), "max_tokens"),
    "n_predict": ((), "max_tokens"),
    "n_cmpl": ((1,), "n"),
    "num_predict": ((), "max_tokens"),
    "max_length": ((), "max_tokens"),
    "min_new_tokens": ((0,), "min_tokens"),
    "min_length": ((0,), "min_tokens"),
    "repeat_penalty": ((1,), "repetition_penalty"),
    "repeat_last_n": ((-1,), ""),  # penalties are on all tokens
    "penalize_nl": ((True,), ""),
    "typical_p": ((1,), ""),
    "top_a": ((0,), "min_p"),
    "top_n_sigma": ((0, -1), "min_p"),
    "tfs_z": ((1,), ""),
    "epsilon_cutoff": ((0,), "min_p"),
    "eta_cutoff": ((0,), "min_p"),
    "mirostat": ((0,), ""),
    "adaptive_target": ((-1,), ""),
    "dynatemp_range": ((0,), "temperature"),
    "xtc_probability": ((0,), ""),
    "dry_multiplier": ((0,), "repetition_penalty"),
    "no_repeat_ngram_size": ((0,), "repetition_penalty"),
    "repetition_detection": ((), "repetition_penalty"),
    "min_keep": ((0, 1), ""),
    "sampling_seed": ((), "seed"),
    "watermarking": ((False,), ""),
    "use_beam_search": ((False,), "best_of"),
    "num_beams": ((1,), "best_of"),
    "length_penalty": ((1,), ""),
    "allowed_token_ids": ((), "logit_bias"),
    "bad_words_ids": ((), "bad_words"),
    "logits_processors": (([],), ""),
    "custom_logit_processor": ((), ""),
    "truncate_prompt_tokens": ((), ""),
    "t_max_prompt_ms": ((0, -1), "timeout"),
    "t_max_predict_ms": ((0, -1), "timeout"),
    "n_indent": ((0,), "stop"),
    "stop_regex": ((), "stop"),
    "stop_sequences": (([],), "stop"),
    "no_stop_trim": ((False,), "include_stop_str_in_output"),
    "cache_salt": (("",), ""),
    "detokenize": ((True,), "return_token_ids"),
    "return_tokens": ((False,), "return_token_ids"),
    "return_prompt_token_ids": ((False,), "return_token_ids"),
    "return_logprob": ((False,), "logprobs"),
    "timings_per_token": ((False,), "stream_options"),
    "reasoning_budget_tokens": ((-1,), ""),
    "spaces_between_special_tokens": ((True,), ""),
}
