"""The bundled model and its vocabulary for grammars: whether a text is whole by one, and what the engine gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from isotherm.actors.attention.engine import Engine
from isotherm.actors.local import local_engine, run
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import (
    Constraint,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
)
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.text.grammar_vocabulary import GrammarVocabulary
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.kernels.select import select_kernels


@cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.load(bundled_model())


def tiny_vocabulary() -> GrammarVocabulary:
    tokenizer = tiny_tokenizer()
    return tokenizer.grammar_vocabulary(tokenizer.vocab_size)


BYTES_END = 256


def byte_tokenizer(*pairs: tuple[str, str]) -> tokenizers.Tokenizer:
    """A token for each byte, BYTES_END, and one for each of the pairs."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>", *map("".join, pairs)]
    made = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(pairs)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return made


def accepts(grammar: str, text: str) -> bool:
    """Whether the text is whole by the grammar. Control tokens in it are tokens."""
    ids = tiny_tokenizer().encode(text, add_special_tokens=False)
    matcher = tiny_vocabulary().compiled(grammar).copy()
    assert not matcher.is_error(), matcher.get_error()
    taken = matcher.try_consume_tokens(ids)
    return bool(taken == len(ids) and matcher.is_accepting())


def tiny_engine(max_model_len: int = 512) -> Engine:
    """The bundled model in this process."""
    kernels = select_kernels("auto", torch.bfloat16, 1).kernels
    config = SchedulerConfig(
        block_size=16, blocks=1024, max_batch_tokens=256, max_sequences=16, max_model_len=max_model_len
    )
    return local_engine(Checkpoint.open(bundled_model()), kernels, config)


def chat_ids(question: str, thinking: bool = False) -> tuple[int, ...]:
    """The prompt of a chat with the bundled model."""
    tokenizer = tiny_tokenizer()
    message = {"role": "user", "content": question}
    return tuple(tokenizer.encode_chat([message], template_kwargs={"thinking": thinking}).ids)


def constrained(name: str, prompt: tuple[int, ...], grammar: str | None, **params: Any) -> GenerationRequest:
    after = params.pop("after", ())
    ends = tuple(sorted(tiny_tokenizer().eos_token_ids))
    asked = {"max_tokens": 200, "stop_token_ids": ends, "seed": 1, **params}
    constraint = None if grammar is None else Constraint(grammar, after)
    return GenerationRequest(name, prompt, SamplingParams(**asked, constraint=constraint))


@dataclass
class Output:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: FinishReason | None = None
    error: str = ""

    @property
    def text(self) -> str:
        return tiny_tokenizer().decode(self.tokens)


def outputs(engine: Engine, *requests: GenerationRequest) -> dict[str, Output]:
    """What each request gives, all in one batch."""
    out = {request.id: Output() for request in requests}
    for delta in run(engine, requests):
        one = out[delta.request_id]
        one.tokens += delta.token_ids
        one.logprobs += delta.logprobs
        one.reason, one.error = delta.finish_reason, delta.error
    return out


def output(engine: Engine, request: GenerationRequest) -> Output:
    return outputs(engine, request)[request.id]
