"""`isotherm generate`: one prompt through the whole engine in this process, without Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from isotherm.actors.local import local_engine, run
from isotherm.actors.models.weights import own_fingerprint, parse_dtype
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.speculation import KINDS
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.config import ModelConfig
from isotherm.cluster.model.generation import NUMBERS
from isotherm.cluster.model.kv_cache import KvCacheDtype
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.cluster.text.tokenizer_files import has_tokenizer
from isotherm.kernels.select import NAMES, Selection, not_one_of, select_kernels

log = logging.getLogger(__name__)


_OPTIONS = ("temperature", "top_p", "top_k", "seed", "logprobs")
# What a request over HTTP may ask for, too.
_RANGES = {**NUMBERS, "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0)}


class OfflineError(IsothermError, ValueError):
    """The options do not fit each other or the model."""


@dataclass(frozen=True)
class OfflineOptions:
    """Exactly one of prompt (text), prompt_ids ("1,2,3") and chat (a user message) is set. How it is computed is as the
    manifest says where it is None."""

    prompt: str | None
    prompt_ids: str | None
    chat: str | None
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    ignore_eos: bool
    dtype: str | None
    kernels: str | None
    logprobs: int | None
    weights: WeightChoice | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)  # other fields of SamplingParams
    isa: str | None = None
    speculation: str | None = None
    kv_cache_dtype: KvCacheDtype | None = None
    device: str | None = None  # cpu or cuda


def generate_offline(
    manifest: Manifest,
    path: Path,
    options: OfflineOptions,
    show: Callable[[str], None] | None = None,
    note: Callable[[str], None] = log.info,
) -> JSON:
    """token_ids, text, logprobs (per token: token_id, logprob, top), finish_reason, drafts (how many were right and
    wrong) and system_fingerprint, which replies of a cluster that computes the same bits have too. `show` is given the
    text as it grows, `note` with which kernels it is computed."""
    _check(options)
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    # With --prompt-ids a model without a tokenizer will do: there is then no text.
    tokenizer = Tokenizer.load(path) if options.prompt_ids is None or has_tokenizer(path) else None
    prompt = _prompt_ids(options, tokenizer, config.vocab_size)
    length = len(prompt) + options.max_tokens
    _check_fit(options, len(prompt), config)
    selection = _selection(manifest, options)
    note(f"kernels: {selection.reason}")
    block_size = manifest.engine.block_size
    scheduler = SchedulerConfig(
        block_size, -(-length // block_size), manifest.engine.max_batch_tokens, 1, length, prefix_cache=False
    )
    choice = options.weights or manifest.weights.choice
    kept = options.kv_cache_dtype or manifest.engine.kv_cache_dtype
    kind, most = options.speculation or manifest.speculation.kind, manifest.speculation.tokens
    engine = local_engine(
        checkpoint, selection.kernels, scheduler, choice=choice, speculation=kind, tokens=most, kv_cache_dtype=kept
    )
    stop = () if options.ignore_eos else tokenizer.eos_token_ids if tokenizer is not None else config.eos_token_ids
    params = _params(options, tuple(stop))
    stream = None if tokenizer is None else tokenizer.stream()
    text, reason = "", None
    tokens: list[int] = []
    logprobs: list[JSON] = []
    accepted = rejected = 0
    for delta in run(engine, [GenerationRequest("offline", prompt, params)]):
        tokens += delta.token_ids
        reason = delta.finish_reason
        accepted, rejected = accepted + delta.drafts_accepted, rejected + delta.drafts_rejected
        logprobs += [
            {"token_id": t, "logprob": p.chosen, "top": p.top}
            for t, p in zip(delta.token_ids, delta.logprobs, strict=False)
        ]
        if stream is not None:
            new = stream.push(delta.token_ids).text + (stream.flush() if reason is not None else "")
            text += new
            if show is not None:
                show(new)
    return {
        "token_ids": tokens,
        "text": text if stream is not None else None,
        "logprobs": logprobs if options.logprobs is not None else None,
        "finish_reason": None if reason is None else reason.value,
        "prompt_tokens": len(prompt),
        "drafts": {"accepted": accepted, "rejected": rejected},
        "system_fingerprint": own_fingerprint(checkpoint, selection.kernels, choice, kept).digest,
    }


def _selection(manifest: Manifest, options: OfflineOptions) -> Selection:
    return select_kernels(
        options.kernels or manifest.kernels,
        parse_dtype(options.dtype or manifest.dtype),
        device=options.device or manifest.device,
        isa=options.isa or manifest.isa,
    )


def _params(options: OfflineOptions, stop: tuple[int, ...]) -> SamplingParams:
    params = SamplingParams(
        options.max_tokens,
        options.temperature,
        options.top_p,
        options.top_k,
        seed=options.seed,
        stop_token_ids=stop,
        logprobs=options.logprobs,
    )
    return replace(params, **options.sampling)  # type: ignore[arg-type]  # each of its own type, by sampling_asked


def sampling_asked(words: Sequence[str]) -> dict[str, float]:
    """ "min_p=0.05" → {"min_p": 0.05}, for the numbers of SamplingParams that have no option of their own. Raises
    OfflineError."""
    known: dict[str, type[int] | type[float]] = {}
    for one in fields(SamplingParams):
        for kind in (int, float):
            if type(one.default) is kind and one.name not in _OPTIONS:
                known[one.name] = kind
    asked: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            raise OfflineError(f"--sampling {word}: must be NAME=VALUE, with one of {', '.join(known)}")
        try:
            asked[name] = known[name](value)
        except ValueError:
            wanted = "an integer" if known[name] is int else "a number"
            raise OfflineError(f'--sampling {name} is "{value}"; it must be {wanted}') from None
    return asked


def _check(options: OfflineOptions) -> None:
    """Against each other. Raises OfflineError."""
    if sum(o is not None for o in (options.prompt, options.prompt_ids, options.chat)) != 1:
        raise OfflineError("give one of --prompt TEXT, --prompt-ids 1,2,3 and --chat TEXT")
    if options.dtype not in (None, "float32", "bfloat16"):
        raise OfflineError(f'--dtype is "{options.dtype}"; it must be "float32" or "bfloat16"')
    if options.kernels not in (None, *NAMES):
        raise OfflineError(not_one_of("--kernels", options.kernels, NAMES))
    ranges = {**_RANGES, "min_tokens": (0, options.max_tokens)}
    for name, value in {"temperature": options.temperature, "top_p": options.top_p, **options.sampling}.items():
        least, most = ranges[name]
        if not least <= value <= most:  # NaN is not, either
            raise OfflineError(f"{name} is {value:g}; it must be between {least:g} and {most:g}")


def _check_fit(options: OfflineOptions, prompt_tokens: int, config: ModelConfig) -> None:
    """Against the model. Raises OfflineError."""
    if prompt_tokens + options.max_tokens > config.max_position_embeddings:
        raise OfflineError(
            f"{prompt_tokens} prompt tokens and --max-tokens {options.max_tokens} exceed the model's "
            f"{config.max_position_embeddings}"
        )
    if options.speculation not in (None, *KINDS):
        raise OfflineError(f'--speculation is "{options.speculation}"; it must be {", ".join(KINDS)}')
    if options.logprobs is not None and options.logprobs > config.vocab_size:
        raise OfflineError(f"--logprobs is {options.logprobs}; the vocabulary has {config.vocab_size} tokens")


def _prompt_ids(options: OfflineOptions, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[int, ...]:
    if options.prompt_ids is not None:
        try:
            ids = [int(i) for i in options.prompt_ids.split(",")]
        except ValueError:
            raise OfflineError(
                f'--prompt-ids is "{options.prompt_ids}"; it must be token ids with commas between them'
            ) from None
        if bad := [i for i in ids if not 0 <= i < vocab_size]:
            raise OfflineError(f"--prompt-ids has {bad[0]}; the vocabulary has ids 0 to {vocab_size - 1}")
        return tuple(ids)
    assert tokenizer is not None
    if options.chat is not None:
        return tuple(tokenizer.encode_chat([{"role": "user", "content": options.chat}]).ids)
    assert options.prompt is not None
    ids = tokenizer.encode(options.prompt)
    if not ids:
        raise OfflineError("--prompt is empty")
    return tuple(ids)
