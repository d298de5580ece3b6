"""From a checked request body to the engine's requests: templates, token ids, length checks, seeds. Blocking but
without I/O of its own; a large prompt takes a while, so the front door runs it in a worker thread."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.parse import parse_body
from isotherm.cluster.api.schemas import ChatBody, CompletionBody, GenerationBody
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.text.chat_template import ChatTemplateBrokenError, ChatTemplateError
from isotherm.cluster.text.output import OutputParser
from isotherm.cluster.text.output_parsers import make_parser
from isotherm.cluster.text.tokenizer import NoChatTemplateError, Tokenizer

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
OPENAI_DEFAULTS: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1.0}
# What a body says of sampling under the name that it has for the engine too, and nothing has to be made of it.
_SAMPLING = sorted(
    {field.name for field in fields(SamplingParams)}.intersection(GenerationBody.model_fields)
    - {"max_tokens", "seed", "stop_token_ids", "logprobs", "logit_bias"}
)


@dataclass(frozen=True)
class PromptLimits:
    """What a prompt may be. Tokens, but for `max_prompt_chars`, which is looked at before a prompt costs a
    tokenisation."""

    max_model_len: int
    vocab_size: int
    max_prompt_chars: int


@dataclass(frozen=True)
class Prepared:
    """One HTTP request, ready for the engine. `requests[i]` is choice i: `n` of them for each prompt,
    prompt by prompt."""

    id: str  # of the reply
    body: ChatBody | CompletionBody
    requests: tuple[GenerationRequest, ...]
    echo: tuple[str, ...]  # for each choice the text to put before it
    new_parser: Callable[[], OutputParser]  # of a choice's output

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counted once, however many choices it has."""
        return sum(len(request.prompt) for request in self.requests[:: self.body.n or 1])


def prepare_chat(
    raw: bytes,
    reply_id: str,
    models: Collection[str],
    tokenizer: Tokenizer,
    limits: PromptLimits,
    defaults: Mapping[str, Any] = OPENAI_DEFAULTS,
) -> Prepared:
    """The requests for a body of /v1/chat/completions; `defaults`: what it is taken to ask for where it does not say,
    by the names of SamplingParams. Raises ReplyError."""
    body = parse_body(ChatBody, raw)
    _check_model(body.model, models)
    messages = [message.for_template() for message in body.messages]
    _check_chars(sum(len(message["content"] or "") for message in messages), limits, "messages")
    try:
        prompt = tokenizer.render_chat(messages, template_kwargs=body.chat_template_kwargs)
    except NoChatTemplateError as error:
        raise ReplyError(str(error), param="messages") from None
    except ChatTemplateBrokenError as error:
        raise ReplyError(str(error), status=500, kind="server_error") from None
    except ChatTemplateError as error:
        raise ReplyError(f"messages: the model's chat template refused them: {error}", param="messages") from None
    _check_chars(len(prompt), limits, "messages")
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    requests = _requests(body, [ids], ["messages"], reply_id, tokenizer, limits, defaults)
    parser = "plain" if body.separate_reasoning is False else "think"
    return Prepared(reply_id, body, requests, ("",) * (body.n or 1), partial(make_parser, parser, prompt))


def prepare_completion(
    raw: bytes,
    reply_id: str,
    models: Collection[str],
    tokenizer: Tokenizer,
    limits: PromptLimits,
    defaults: Mapping[str, Any] = OPENAI_DEFAULTS,
) -> Prepared:
    """The requests for a body of /v1/completions. Raises ReplyError."""
    body = parse_body(CompletionBody, raw)
    _check_model(body.model, models)
    prompts, params = body.prompts, [body.prompt_param(i) for i in range(len(body.prompts))]
    ids: list[list[int]] = []
    for prompt, param in zip(prompts, params, strict=True):
        if isinstance(prompt, str):
            _check_chars(len(prompt), limits, param)
            ids.append(tokenizer.encode(prompt))
        else:
            ids.append(list(prompt))
    requests = _requests(body, ids, params, reply_id, tokenizer, limits, defaults)
    texts = (
        [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
        if body.echo
        else [""] * len(prompts)
    )
    echo = tuple(text for text in texts for _ in range(body.n or 1))
    return Prepared(reply_id, body, requests, echo, partial(make_parser, "plain"))


def choice_seed(seed: int, sample: int) -> int:
    """The seed of the sample-th of `n` choices, 63 bits. Sample 0 has the request's own seed (a negative one modulo
    2**63), so that asking for more choices leaves the first as it was."""
    seed %= 2**63
    if sample == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest(), "big") >> 1


def _requests(
    body: ChatBody | CompletionBody,
    prompts: list[list[int]],
    params: list[str],
    reply_id: str,
    tokenizer: Tokenizer,
    limits: PromptLimits,
    defaults: Mapping[str, Any],
) -> tuple[GenerationRequest, ...]:
    base_seed = secrets.randbits(63) if body.seed is None else body.seed
    sampling = _sampling(body, tokenizer, limits, defaults)
    requests: list[GenerationRequest] = []
    for ids, param in zip(prompts, params, strict=True):
        max_tokens = _max_tokens(body, len(ids), param, limits, defaults.get("max_tokens"))
        if sampling.min_tokens > max_tokens:
            raise ReplyError(
                f"min_tokens: {sampling.min_tokens} are more than the {max_tokens} that the output may have",
                param="min_tokens",
            )
        if not ids:
            raise ReplyError(f"{param}: the prompt has no tokens", param=param)
        if max(ids) >= limits.vocab_size:
            at = next(i for i, id_ in enumerate(ids) if id_ >= limits.vocab_size)
            _check_token(ids[at], f"{param}[{at}]", limits)
        prompt = tuple(ids)
        for sample in range(body.n or 1):
            requests.append(
                GenerationRequest(
                    f"{reply_id}-{len(requests)}",
                    prompt,
                    replace(sampling, max_tokens=max_tokens, seed=choice_seed(base_seed, sample)),
                    priority=body.priority or 0,
                    user=body.user or "",
                )
            )
    return tuple(requests)


def _sampling(
    body: ChatBody | CompletionBody, tokenizer: Tokenizer, limits: PromptLimits, defaults: Mapping[str, Any]
) -> SamplingParams:
    """What a body asks for; its `max_tokens` and `seed` are still to come."""
    stop_ids = set(body.stop_token_ids or ()) | (set() if body.ignore_eos else tokenizer.eos_token_ids)
    for i, id_ in enumerate(body.stop_token_ids or ()):
        _check_token(id_, f"stop_token_ids[{i}]", limits)
    # One value for a token, however its id is written ("5", "05"): of two, which one is added would be left to chance.
    bias = tuple(sorted({int(token): value for token, value in (body.logit_bias or {}).items()}.items()))
    for token, _ in bias:
        _check_token(token, f"logit_bias[{token}]", limits)
    said = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    return SamplingParams(
        **{"max_tokens": 1, **defaults, **said},
        stop_token_ids=tuple(sorted(stop_ids)),
        logprobs=body.logprob_count,
        logit_bias=bias,
    )


def _max_tokens(
    body: ChatBody | CompletionBody, prompt_len: int, param: str, limits: PromptLimits, default: int | None
) -> int:
    fits = limits.max_model_len - prompt_len
    wanted = body.output_limit
    if fits < 1 or (wanted is not None and wanted > fits):
        asked = "at least 1" if wanted is None else str(wanted)
        raise ReplyError(
            f"{param}: this model's context is {limits.max_model_len} tokens, but the request needs {prompt_len} for "
            f"the prompt and {asked} for the output",
            param=param,
            code="context_length_exceeded",
        )
    if wanted is not None:
        return wanted
    if default is None and isinstance(body, CompletionBody):
        default = _COMPLETION_MAX_TOKENS
    return fits if default is None else min(fits, default)


def _check_model(name: str, models: Collection[str]) -> None:
    if name not in models:
        raise ReplyError(
            f"model: {name[:100]!r} is not served here; GET /v1/models lists what is",
            status=404,
            param="model",
            code="model_not_found",
        )


def _check_chars(chars: int, limits: PromptLimits, param: str) -> None:
    if chars > limits.max_prompt_chars:
        raise ReplyError(
            f"{param}: {chars} characters are more than the {limits.max_prompt_chars} that a context of "
            f"{limits.max_model_len} tokens may take",
            param=param,
            code="context_length_exceeded",
        )


def _check_token(token_id: int, param: str, limits: PromptLimits) -> None:
    if token_id >= limits.vocab_size:
        raise ReplyError(
            f"{param}: token id {token_id} is outside the vocabulary (0 to {limits.vocab_size - 1})", param=param
        )
