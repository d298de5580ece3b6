"""From a chat to the engine's requests: the template, its token ids, and the parser of what comes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.openai_replies import OpenAIReply
from isotherm.cluster.api.parse import parse_body
from isotherm.cluster.api.prepare import Prepared, Served, check_chars, check_model, generation_requests
from isotherm.cluster.text.chat_template import ChatTemplateBrokenError, ChatTemplateError
from isotherm.cluster.text.output_parsers import make_parser
from isotherm.cluster.text.tokenizer import NoChatTemplateError


def prepare_chat(raw: bytes, reply_id: str, served: Served) -> Prepared:
    """The requests for a body of /v1/chat/completions. Raises ReplyError."""
    return prepare_chat_body(parse_body(ChatBody, raw), reply_id, served)


def prepare_chat_body(body: ChatBody, reply_id: str, served: Served) -> Prepared:
    """As `prepare_chat`, for a body that is checked already: other routes' bodies are made into chats. Raises
    ReplyError."""
    prompt = chat_prompt(body, served)
    requests = generation_requests(body, [prompt.ids], ["messages"], reply_id, served)
    parser = "plain" if body.separate_reasoning is False else "think"
    new_parser = partial(make_parser, parser, prompt.text)
    new_reply = partial(OpenAIReply, reply_id, body.model, chat=True, include_usage=body.include_usage)
    return Prepared(reply_id, body, requests, ("",) * (body.n or 1), new_parser, new_reply)


@dataclass(frozen=True)
class ChatPrompt:
    text: str
    ids: list[int]


def chat_prompt(body: ChatBody, served: Served) -> ChatPrompt:
    """What the model is to go on from. Raises ReplyError."""
    tokenizer, limits = served.tokenizer, served.limits
    check_model(body.model, served.names)
    messages = [message.for_template() for message in body.messages]
    check_chars(sum(len(message["content"] or "") for message in messages), limits, "messages")
    try:
        prompt = tokenizer.render_chat(messages, template_kwargs=body.chat_template_kwargs)
    except NoChatTemplateError as error:
        raise ReplyError(str(error), param="messages") from None
    except ChatTemplateBrokenError as error:
        raise ReplyError(str(error), status=500, kind="server_error") from None
    except ChatTemplateError as error:
        raise ReplyError(f"messages: the model's chat template refused them: {error}", param="messages") from None
    check_chars(len(prompt), limits, "messages")
    return ChatPrompt(prompt, tokenizer.encode(prompt, add_special_tokens=False))
