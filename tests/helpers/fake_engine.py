"""A deterministic engine without a model: what it generates is a function of prompt, seed and position alone. And a
small byte-level tokenizer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from isotherm.cluster.api.engine_client import EngineOverloadedError, EngineUnavailableError
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, PromptLogprobs, TokenLogprobs

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<Assistant>{{ m.content }}{% elif m.role == 'system' %}{{ m.content }}"
    "{% else %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<Assistant>{% if thinking %}<think>{% endif %}{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "What is 3 + 4? 7.",
    "hello world, hello there",
    "日本語のテキスト 😀 naïve café",
]


def write_tokenizer(directory: Path, **config: Any) -> Path:
    """A checkpoint's tokenizer files. `config` goes into tokenizer_config.json, None removing a key."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    backend.save(str(directory / "tokenizer.json"))
    values = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": BOS},
        "eos_token": EOS,
        "add_bos_token": True,
        "chat_template": TEMPLATE,
        **config,
    }
    text = json.dumps({key: value for key, value in values.items() if value is not None}, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return directory


def prompt_scores(request: GenerationRequest) -> Iterator[PromptLogprobs]:
    """In two parts, where they are asked for: token i has -i / 10, and the likeliest are 2, 3, … ."""
    top, length = request.params.prompt_logprobs, len(request.prompt)
    if top is not None:
        for part in (range(1, length // 2), range(max(1, length // 2), length)):
            scores = [TokenLogprobs(-i / 10, tuple((2 + j, -j / 10) for j in range(top)), rank=i) for i in part]
            if scores:
                yield PromptLogprobs(part.start, tuple(scores))


class FakeEngine:
    """Says "t<position> " over and over in words of the prompt's hash, or exactly `script` (token ids) where given.
    `open` has the requests in progress, `closed_early` counts those that were closed before their end."""

    def __init__(
        self,
        vocab_size: int,
        *,
        max_model_len: int = 512,
        script: Sequence[int] = (),
        per_delta: int = 1,
        delay_s: float = 0.0,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.script = list(script)
        self.per_delta = per_delta
        self.delay_s = delay_s
        self.fail_after: int | None = None  # tokens; then a Delta with an error
        self.unavailable = ""
        self.full = ""  # every request is refused by the shard
        self.places, self.tokens = 10_000, 10_000_000
        self.system_fingerprint = "isotherm-0123456789ab"
        self.reason: str | None = None
        self.holds_up: str | None = None
        self.open: set[str] = set()
        self.closed_early = 0
        self.seen: list[GenerationRequest] = []

    def not_ready(self) -> str | None:
        return self.reason

    async def held_up(self) -> str | None:
        return self.holds_up

    def capacity(self) -> int:
        return self.places

    def token_capacity(self) -> int:
        return self.tokens

    async def status(self) -> dict[str, Any]:
        return {"workers": [], "placement_version": 1}

    def token(self, request: GenerationRequest, index: int) -> int:
        if self.script:
            return self.script[index % len(self.script)]
        key = repr((request.prompt, request.params.seed if request.params.temperature else 0, index)).encode()
        token = 2 + int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") % (self.vocab_size - 2)
        # The last is <think>: of requests without a seed one in four hundred would begin a thought.
        return token if token < self.vocab_size - 1 else 2

    def logprob(self, request: GenerationRequest) -> float:
        return -0.5

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        if self.unavailable:
            raise EngineUnavailableError(self.unavailable)
        if self.full:
            raise EngineOverloadedError(self.full)
        self.seen.append(request)
        self.open.add(request.id)
        finished = False
        try:
            at = 0
            for part in prompt_scores(request):
                yield Delta(request.id, 0, prompt=part)
            if not request.params.max_tokens:
                finished = True
                yield Delta(request.id, 0, (), FinishReason.LENGTH)
            while not finished:
                await asyncio.sleep(self.delay_s)
                if self.fail_after is not None and at >= self.fail_after:
                    finished = True
                    yield Delta(request.id, at, (), FinishReason.ERROR, error="the forward pass failed")
                    return
                tokens: list[int] = []
                reason = None
                while len(tokens) < self.per_delta and reason is None:
                    tokens.append(self.token(request, at + len(tokens)))
                    if tokens[-1] in request.params.stop_token_ids:
                        reason = FinishReason.STOP
                    elif at + len(tokens) == request.params.max_tokens:
                        reason = FinishReason.LENGTH
                top = request.params.logprobs
                logprobs = (
                    ()
                    if top is None
                    else tuple(
                        TokenLogprobs(self.logprob(request), tuple((t + i, -0.5 - i) for i in range(top)))
                        for t in tokens
                    )
                )
                finished = reason is not None
                yield Delta(request.id, at, tuple(tokens), reason, logprobs, cached_tokens=len(request.prompt) // 2)
                at += len(tokens)
        finally:
            self.open.discard(request.id)
            self.closed_early += not finished


@contextmanager
def http_server(app: Any, protocol: Any = "auto", **options: Any) -> Iterator[str]:
    """The app under uvicorn on a free loopback port: its base URL. `options`: others of uvicorn's."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", http=protocol, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
