"""Fields that bodies of other servers have beyond sampling: what is refused by name unless it asks for nothing, and
what may stand there without any effect. A field that a body has counts for itself, whatever is said here."""

from __future__ import annotations

from typing import Any

# Field → the values that ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    # Output in a form (SGLang, llama.cpp, vLLM).
    "structural_tag": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    # Thoughts.
    "thinking": (),
    "enable_thinking": (),
    "reasoning": (),
    "thinking_budget": (),
    "thinking_token_budget": (),
    "max_thinking_tokens": (),
    "include_reasoning": (True,),
    "stream_reasoning": (True,),
    # What a reply says beside its text.
    "return_hidden_states": (False,),
    "return_tokens_as_token_ids": (False,),
    "logprob_token_ids": ([],),
    "token_ids_logprob": ([],),
    "logprob_start_len": (-1,),
    "n_probs": (0,),
    # Whose cache, adapter, place.
    "extra_key": ("",),
    "cache_prompt": (True,),
    "id_slot": (-1,),
    "lora_path": (),
    "session_params": (),
    "data_parallel_rank": (),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "custom_params": ({},),
    "samplers": (),
    # What the model cannot take.
    "prompt_embeds": (),
    "mm_processor_kwargs": ({},),
    "max_dynamic_patch": (),
    "moderation": (),
}

# Field → why nothing is missed.
HARMLESS: dict[str, str] = {
    "metadata": "for the client's own books: nothing is stored",
    "store": "nothing is stored",
    "service_tier": "there is one; see priority",
    "prompt_cache_key": "a hint; the prefix cache finds what fits",
    "prompt_cache_options": "a hint; the prefix cache finds what fits",
    "prompt_cache_retention": "a hint; the prefix cache keeps what it has room for",
    "safety_identifier": "for the provider's own books",
    "prediction": "a hint that changes no token",
    "request_id": "the x-request-id header names a request",
    "rid": "the x-request-id header names a request",
    "return_cached_tokens_details": "usage always has them",
}
