"""The routes that make token ids of text and text of token ids, as a generation would, without one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from isotherm.cluster.api.bodies.tokenization import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from isotherm.cluster.api.body import read_body
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.generation import Generator
from isotherm.cluster.api.parse import checked, json_object
from isotherm.cluster.api.prepare import Served, check_chars, check_model, check_token
from isotherm.cluster.api.prepare_chat import chat_prompt
from isotherm.cluster.api.replies import json_response
from isotherm.cluster.jsontypes import JSON


class Tokenization:
    """`generator` says what is served; `max_body_bytes` is the limit of a body."""

    def __init__(self, generator: Generator, max_body_bytes: int) -> None:
        self._generator, self._max_body_bytes = generator, max_body_bytes

    async def tokenize(self, request: Request) -> Response:
        return await self._answer(request, tokenize)

    async def detokenize(self, request: Request) -> Response:
        return await self._answer(request, detokenize)

    async def _answer(self, request: Request, work: Callable[[bytes, Served], JSON]) -> Response:
        raw = await read_body(request, self._max_body_bytes)
        return json_response(await asyncio.to_thread(work, raw, self._generator.served_to(request)))


def tokenize(raw: bytes, served: Served) -> JSON:
    """vLLM's answer to a body of /tokenize. Raises ReplyError."""
    data = json_object(raw)
    if data.get("model") is None:
        data["model"] = next(iter(served.names))
    if data.get("messages") is not None:
        if data.get("prompt") is not None:
            raise ReplyError("prompt and messages are both given; give one of them", param="prompt")
        chat = checked(TokenizeChatBody, data)
        ids = chat_prompt(chat, served).ids
        strings = chat.return_token_strs
    else:
        body = checked(TokenizeTextBody, data)
        check_model(str(body.model), served.names)
        check_chars(len(body.prompt), served.limits, "prompt")
        ids = served.tokenizer.encode_prompt(body.prompt, body.add_special_tokens)
        strings = body.return_token_strs
    return {
        "count": len(ids),
        "max_model_len": served.limits.max_model_len,
        "tokens": ids,
        "token_strs": [served.tokenizer.token_string(id_) for id_ in ids] if strings else None,
    }


def detokenize(raw: bytes, served: Served) -> JSON:
    """vLLM's answer to a body of /detokenize. Raises ReplyError."""
    body = checked(DetokenizeBody, json_object(raw))
    if body.model is not None:
        check_model(body.model, served.names)
    size = served.limits.vocab_size
    if max(body.tokens, default=0) >= size:
        at = next(i for i, id_ in enumerate(body.tokens) if id_ >= size)
        check_token(body.tokens[at], f"tokens[{at}]", served.limits)
    return {"prompt": served.tokenizer.decode(body.tokens, skip_special_tokens=False)}
