"""From a checked request body to the engine's requests: templates, token ids, length checks, seeds. Blocking but
without I/O of its own; a large prompt takes a while, so the front door runs it in a worker thread."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from isotherm.cluster.api.access.caller import ANYONE, Caller
from isotherm.cluster.api.access.limits import check_limits, most_tokens
from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.common import GenerationBody
from isotherm.cluster.api.bodies.completion import CompletionBody
from isotherm.cluster.api.choices import LogprobForm
from isotherm.cluster.api.errors import ContextLengthError, ReplyError
from isotherm.cluster.api.replies import Reply
from isotherm.cluster.messages.requests import Constraint, GenerationRequest, SamplingParams
from isotherm.cluster.text.output import OutputParser
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.cluster.text.tool_formats.base import ToolFormat

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
_NO_SEED = -1  # what clients send that cannot leave the field out
OPENAI_DEFAULTS: Mapping[str, Any] = {"temperature": 1.0, "top_p": 1.0}
# What a body says of sampling under the name that it has for the engine too, and nothing has to be made of it.
_SAMPLING = sorted(
    {of.name for of in fields(SamplingParams)}.intersection(GenerationBody.model_fields)
    - {"max_tokens", "seed", "stop_token_ids", "bad_words", "logprobs", "prompt_logprobs", "logit_bias"}
)


@dataclass(frozen=True)
class PromptLimits:
    """What a prompt may be. Tokens, but for `max_prompt_chars`, which is looked at before a prompt costs a
    tokenisation."""

    max_model_len: int
    vocab_size: int
    max_prompt_chars: int


@dataclass(frozen=True)
class Served:
    """The model that bodies are about: its names, what makes token ids of text, its limits, what bodies that do not say
    are taken to ask for, by the names of SamplingParams, how it calls tools, and who asks."""

    names: Collection[str]
    tokenizer: Tokenizer
    limits: PromptLimits
    defaults: Mapping[str, Any] = field(default_factory=lambda: OPENAI_DEFAULTS)
    tool_format: ToolFormat | None = None  # of its calls, where it is known
    caller: Caller = ANYONE


async def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Prepared:
    """One HTTP request, ready for the engine. `requests[i]` is choice i: `body.samples` of them for each prompt,
    prompt by prompt."""

    id: str  # of the reply
    body: ChatBody | CompletionBody
    requests: tuple[GenerationRequest, ...]
    echo: tuple[str, ...]  # for each choice the text to put before it
    new_parser: Callable[[int], OutputParser]  # of a choice's output, from its index
    new_reply: Callable[[int, str | None], Reply]  # from seconds since the epoch and the system fingerprint
    logprob_form: LogprobForm | None = LogprobForm.CHAT  # None: they are not shown
    settle: Callable[[], Awaitable[None]] = _nothing  # between the making of a reply's end and its sending
    meter: Callable[[int], None] | None = None  # is told of output tokens as they come

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counted once, however many choices it has."""
        return sum(len(request.prompt) for request in self.requests[:: self.body.samples])

    def bound(self, fingerprint: str) -> Prepared:
        """With all choices of the weights whose fingerprint the reply has."""
        return replace(self, requests=tuple(replace(one, fingerprint=fingerprint) for one in self.requests))


def choice_seed(seed: int, sample: int) -> int:
    """The seed of the sample-th of `n` choices, 63 bits. Sample 0 has the request's own seed (a negative one modulo
    2**63), so that asking for more choices leaves the first as it was."""
    seed %= 2**63
    if sample == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest(), "big") >> 1


def generation_requests(
    body: ChatBody | CompletionBody,
    prompts: list[list[int]],
    params: list[str],
    reply_id: str,
    served: Served,
    constraint: Constraint | None = None,
) -> tuple[GenerationRequest, ...]:
    """`body.samples` for each prompt; `params`: the prompts' names in errors. What is said of a prompt itself is asked
    of its first choice, but in a stream of each: none waits there for another. Raises ReplyError."""
    limits, caller = served.limits, served.caller
    check_limits(caller, body)
    base_seed = secrets.randbits(63) if body.seed in (None, _NO_SEED) else body.seed
    sampling = _sampling(body, served, constraint)
    requests: list[GenerationRequest] = []
    for index, (ids, param) in enumerate(zip(prompts, params, strict=True)):
        max_tokens = _max_tokens(body, len(ids), param, limits, served.defaults.get("max_tokens"))
        if body.output_limit is None:
            max_tokens = most_tokens(caller, max_tokens)
        check_min_tokens(sampling.min_tokens, max_tokens)
        if not ids:
            raise ReplyError(f"{param}: the prompt has no tokens", param=param)
        if max(ids) >= limits.vocab_size:
            at = next(i for i, id_ in enumerate(ids) if id_ >= limits.vocab_size)
            check_token(ids[at], f"{param}[{at}]", limits)
        prompt, of_prompt = tuple(ids), body.prompt_logprob_count
        for sample in range(body.samples):
            requests.append(
                GenerationRequest(
                    f"{reply_id}-{len(requests)}",
                    prompt,
                    replace(
                        sampling,
                        max_tokens=max_tokens,
                        seed=choice_seed(base_seed, sample),
                        prompt_logprobs=of_prompt if sample == 0 or body.stream else None,
                    ),
                    priority=caller.priority if body.priority is None else body.priority,
                    key=caller.name,
                    family=f"{reply_id}/{index}" if body.samples > 1 else "",
                )
            )
    return tuple(requests)


def told_prompts(body: ChatBody | CompletionBody, prompts: Sequence[list[int]]) -> tuple[list[int], ...] | None:
    """For each choice of the reply its prompt's token ids, where they are asked for."""
    return tuple(ids for ids in prompts for _ in range(body.n or 1)) if body.return_token_ids else None


def _sampling(body: ChatBody | CompletionBody, served: Served, constraint: Constraint | None) -> SamplingParams:
    """What a body asks for; its `max_tokens` and `seed` are still to come."""
    limits = served.limits
    stop_ids = set(body.stop_token_ids or ())
    if not body.ignore_eos or constraint is not None:  # a grammar says where the text may end, and lets it end only so
        stop_ids |= served.tokenizer.eos_token_ids
    for i, id_ in enumerate(body.stop_token_ids or ()):
        check_token(id_, f"stop_token_ids[{i}]", limits)
    # One value for a token, however its id is written ("5", "05"): of two, which one is added would be left to chance.
    bias = tuple(sorted({int(token): value for token, value in (body.logit_bias or {}).items()}.items()))
    for token, _ in bias:
        check_token(token, f"logit_bias[{token}]", limits)
    logprobs = body.logprob_count
    if logprobs is None and body.samples > (body.n or 1):
        logprobs = 0  # by which the best are chosen
    said = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    return SamplingParams(
        **{"max_tokens": 1, **served.defaults, **said},
        stop_token_ids=tuple(sorted(stop_ids)),
        bad_words=_bad_words(body.bad_words or (), served.tokenizer),
        logprobs=logprobs,
        logit_bias=bias,
        constraint=constraint,
        speculate=body.speculation != "off",
    )


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token ids of each as it is written, and of the word with a space before it and with none: in the middle of a
    text it has other tokens than at its beginning."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip() or word
        for text in (word, bare, f" {bare}"):
            if ids := tokenizer.encode(text, add_special_tokens=False):
                found[tuple(ids)] = None
    return tuple(found)


def _max_tokens(
    body: ChatBody | CompletionBody, prompt_len: int, param: str, limits: PromptLimits, default: int | None
) -> int:
    fits = limits.max_model_len - prompt_len
    wanted = body.output_limit
    if (fits < 1 and wanted != 0) or (wanted is not None and wanted > fits):
        asked = "at least 1" if wanted is None else str(wanted)
        raise ContextLengthError(
            f"{param}: this model's maximum context length is {limits.max_model_len} tokens, but the request needs "
            f"{prompt_len} for the prompt and {asked} for the output",
            param,
            f"{prompt_len + (wanted or 1)} tokens > {limits.max_model_len}",
        )
    if wanted is not None:
        return wanted
    if default is None and isinstance(body, CompletionBody):
        default = _COMPLETION_MAX_TOKENS
    return fits if default is None else min(fits, default)


def check_model(name: str, models: Collection[str]) -> None:
    if name not in models:
        raise ReplyError(
            f"model: {name[:100]!r} is not served here; GET /v1/models lists what is",
            status=404,
            param="model",
            code="model_not_found",
        )


def check_chars(chars: int, limits: PromptLimits, param: str) -> None:
    if chars > limits.max_prompt_chars:
        most = limits.max_prompt_chars
        raise ContextLengthError(
            f"{param}: {chars} characters are more than the {most} that a prompt may have by this model's maximum "
            "context length",
            param,
            f"{chars} characters > {most}",
        )


def check_min_tokens(min_tokens: int, max_tokens: int) -> None:
    if min_tokens > max_tokens:
        message = f"min_tokens: {min_tokens} are more than the {max_tokens} that the output may have"
        raise ReplyError(message, param="min_tokens")


def check_token(token_id: int, param: str, limits: PromptLimits) -> None:
    if token_id >= limits.vocab_size:
        raise ReplyError(
            f"{param}: token id {token_id} is outside the vocabulary (0 to {limits.vocab_size - 1})", param=param
        )
