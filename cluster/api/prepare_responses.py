"""From a body of /v1/responses to the engine's requests: what was said before it, the chat that both make, and what the
response repeats of the request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from pydantic import TypeAdapter

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.common import BodyModel
from isotherm.cluster.api.bodies.responses import (
    FunctionTool,
    Item,
    ItemReference,
    MessageItem,
    NamespaceTool,
    ResponsesBody,
)
from isotherm.cluster.api.errors import CONTEXT_LENGTH, ReplyError, StreamedError
from isotherm.cluster.api.from_responses import translate_responses
from isotherm.cluster.api.function_names import FunctionNames
from isotherm.cluster.api.parse import checked, parse_body
from isotherm.cluster.api.prepare import Prepared, Served
from isotherm.cluster.api.prepare_chat import chat_prompt, prepare_chat_body
from isotherm.cluster.api.response_store import Kept, ResponseStore
from isotherm.cluster.api.responses_reply import ResponsesReply, item_id
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.requests import SamplingParams

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
_ID_KINDS = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def prepare_responses(store: ResponseStore, owner: str, raw: bytes, reply_id: str, served: Served) -> Prepared:
    """The requests for a body of /v1/responses. Raises ReplyError."""
    body = parse_body(ResponsesBody, raw)
    given, names = _given(store, owner, body), FunctionNames(body.functions)
    translation = translate_responses(body, [*_before(store, owner, body), *given], names)
    try:
        prepared = prepare_chat_body(checked(ChatBody, translation.chat), reply_id, served)
    except ReplyError as error:
        said = translation.at_origin(error)
        if body.stream and error.code == CONTEXT_LENGTH:
            params = SamplingParams(**{"max_tokens": 1, **served.defaults})
            reply = ResponsesReply(reply_id, _said(body, params), _keep_none, int(time.time()), None)
            raise StreamedError(said, reply.error(said)) from None
        raise said from None
    keeping = _Keeping(store, owner, _listed(reply_id, [item for _, item in given])) if body.is_kept else None
    params = prepared.requests[0].params
    new_reply = partial(
        ResponsesReply,
        reply_id,
        _said(body, params),
        _keep_none if keeping is None else keeping.hold,
        seals=body.includes("reasoning.encrypted_content"),
        logprobs=body.includes("message.output_text.logprobs") or bool(body.top_logprobs),
        summarises=body.reasoning is not None and bool(body.reasoning.summary or body.reasoning.generate_summary),
        says_function=names.said,
    )
    return replace(prepared, new_reply=new_reply, settle=prepared.settle if keeping is None else keeping.settle)


def _keep_none(response: JSON) -> None:
    pass


def count_input_tokens(store: ResponseStore, owner: str, raw: bytes, served: Served) -> int:
    """The tokens of the prompt that the body makes; it may be longer than the context. Raises ReplyError."""
    body = parse_body(ResponsesBody, raw)
    items = [*_before(store, owner, body), *_given(store, owner, body)]
    translation = translate_responses(body, items, FunctionNames(body.functions))
    try:
        return len(chat_prompt(checked(ChatBody, translation.chat), served).ids)
    except ReplyError as error:
        raise translation.at_origin(error) from None


class _Keeping:
    """Keeps one response, once it is whole and before the client has its end: it may go on from there at once."""

    def __init__(self, store: ResponseStore, owner: str, items: list[JSON]) -> None:
        self._store = store
        self._owner = owner
        self._items = items
        self._response: JSON | None = None

    def hold(self, response: JSON) -> None:
        self._response = response

    async def settle(self) -> None:
        assert self._response is not None
        kept = Kept.of(self._response, self._items)
        await asyncio.to_thread(self._store.put, self._owner, kept)


def _before(store: ResponseStore, owner: str, body: ResponsesBody) -> Iterator[tuple[str, Item]]:
    """The items of all responses before this one, and of what they answered."""
    chain: list[Kept] = []
    wanted = body.previous_response_id
    while wanted is not None:
        if (kept := store.get(owner, wanted)) is None:
            raise not_kept(wanted, "previous_response_id", "previous_response_not_found")
        chain.append(kept)
        wanted = kept.previous
    for kept in reversed(chain):
        for item in _ITEMS.validate_python([*kept.input_items, *kept.response["output"]]):
            yield "previous_response_id", item


def _given(store: ResponseStore, owner: str, body: ResponsesBody) -> list[tuple[str, Item]]:
    return [(body.input_param(i), _resolved(store, owner, item, i)) for i, item in enumerate(body.items)]


def _resolved(store: ResponseStore, owner: str, item: Item, index: int) -> Item:
    """The item that is meant, where one is only named."""
    if not isinstance(item, ItemReference):
        return item
    _, _, rest = item.id.partition("_")
    kept = store.get(owner, f"resp_{rest.partition('_')[0]}")
    for found in [] if kept is None else [*kept.response["output"], *kept.input_items]:
        if found["id"] == item.id:
            return _ITEMS.validate_python([found])[0]
    raise not_kept(item.id, f"input[{index}].id", "item_not_found")


def not_kept(wanted: str, param: str | None, code: str) -> ReplyError:
    head = "" if param is None else f"{param}: "
    message = (
        f"{head}{wanted[:100]!r} is not kept here: it was not stored, was deleted, belongs to another key, or had to "
        "leave, since responses are kept in bounded memory for as long as the server runs; send the whole conversation"
    )
    return ReplyError(message, status=404, param=param, code=code)


def _listed(response_id: str, items: Sequence[Item]) -> list[JSON]:
    """Input items as they are listed and kept: each with an id, messages with parts."""
    listed = []
    for i, item in enumerate(items):
        dumped = item.model_dump(exclude_none=True)
        kind = dumped["type"]
        if isinstance(item, MessageItem):
            if isinstance(item.content, str):
                part = "output_text" if item.role == "assistant" else "input_text"
                dumped["content"] = [{"type": part, "text": item.content}]
            for part in dumped["content"] if item.role == "assistant" else ():
                part |= {"annotations": []} if part["type"] == "output_text" else {}
        own = item_id(_ID_KINDS[kind], response_id, f"in{i}")
        listed.append({"id": own, "status": "completed", **dumped})
    return listed


def _said(body: ResponsesBody, params: SamplingParams) -> JSON:
    """What a response repeats of its request, with what is taken where it does not say, of which `params` has what is
    about sampling."""
    choice = body.tool_choice
    text = {} if body.text is None else body.text.model_dump(by_alias=True, exclude_none=True)
    reasoning = {} if body.reasoning is None else body.reasoning.model_dump(include={"effort", "summary"})
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": body.model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None, **reasoning},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.is_kept,
        "temperature": params.temperature if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": choice.model_dump(exclude_none=True) if isinstance(choice, BodyModel) else choice or "auto",
        "tools": [_said_tool(tool) for tool in body.tools or () if isinstance(tool, FunctionTool | NamespaceTool)],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _said_tool(tool: FunctionTool | NamespaceTool) -> JSON:
    if isinstance(tool, FunctionTool):
        return {**tool.model_dump(), "strict": bool(tool.strict)}
    members = [_said_tool(one) for _, one in tool.functions]
    return {"type": tool.type, "name": tool.name, "description": tool.description or "", "tools": members}
