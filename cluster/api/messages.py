"""The routes of Anthropic's /v1/messages."""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from isotherm.cluster.api.generation import GenerationRoute, Generator
from isotherm.cluster.api.prepare_messages import count_tokens, prepare_messages
from isotherm.cluster.api.replies import json_response

_MESSAGES = GenerationRoute("msg_", prepare_messages)


def messages_routes(generator: Generator) -> list[Route]:
    return [
        Route("/v1/messages", partial(_create, generator), methods=["POST"]),
        Route("/v1/messages/count_tokens", partial(_count_tokens, generator), methods=["POST"]),
    ]


async def _create(generator: Generator, request: Request) -> Response:
    return await generator.reply(request, _MESSAGES)


async def _count_tokens(generator: Generator, request: Request) -> Response:
    raw = await generator.body(request)
    return json_response({"input_tokens": await asyncio.to_thread(count_tokens, raw, generator.served_to(request))})
