"""From a body of Anthropic's /v1/messages to the engine's requests, and from one of /v1/messages/count_tokens to a
number."""

from __future__ import annotations

from dataclasses import replace

from isotherm.cluster.api.access.limits import most_tokens
from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.messages import Conversation, MessagesBody
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.from_messages import translate_messages
from isotherm.cluster.api.messages_reply import MessagesReply
from isotherm.cluster.api.parse import checked, parse_body
from isotherm.cluster.api.prepare import Prepared, Served, check_min_tokens
from isotherm.cluster.api.prepare_chat import chat_prompt, prepare_chat_body


def prepare_messages(raw: bytes, reply_id: str, served: Served) -> Prepared:
    """The requests for a body of /v1/messages. Raises ReplyError."""
    body = parse_body(MessagesBody, raw)
    translation = translate_messages(body)
    try:
        prepared = prepare_chat_body(checked(ChatBody, translation.chat), reply_id, served)
    except ReplyError as error:
        raise translation.at_origin(error) from None
    return _within_context(prepared, most_tokens(served.caller, body.max_tokens), served.limits.max_model_len)


def _within_context(prepared: Prepared, max_tokens: int, max_model_len: int) -> Prepared:
    """Anthropic's clients have to give `max_tokens`, and give what their usual models can have: where less fits, or
    their key allows less, it is that, and a reply that ends there says so. Raises ReplyError."""
    request = prepared.requests[0]
    fits = max_model_len - len(request.prompt)
    check_min_tokens(request.params.min_tokens, min(max_tokens, fits))
    request = replace(request, params=replace(request.params, max_tokens=min(max_tokens, fits)))
    of = prepared.id, prepared.body.model, prepared.prompt_tokens, fits < max_tokens
    return replace(prepared, requests=(request,), new_reply=lambda created, fingerprint: MessagesReply(*of))


def count_tokens(raw: bytes, served: Served) -> int:
    """The tokens of the prompt that a body of /v1/messages/count_tokens makes, which is the one that the same body
    makes at /v1/messages; it may be longer than the context. Raises ReplyError."""
    translation = translate_messages(parse_body(Conversation, raw))
    try:
        return len(chat_prompt(checked(ChatBody, translation.chat), served).ids)
    except ReplyError as error:
        raise translation.at_origin(error) from None
