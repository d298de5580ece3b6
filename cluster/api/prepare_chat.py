"""From a chat to the engine's requests: the template, its token ids, and the parser of what comes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.errors import NOT_AGAIN, ReplyError
from isotherm.cluster.api.openai_replies import OpenAIReply
from isotherm.cluster.api.parse import parse_body
from isotherm.cluster.api.prepare import Prepared, Served, check_chars, check_model, generation_requests, told_prompts
from isotherm.cluster.api.structure import output_constraint
from isotherm.cluster.api.thinking import parser_for, thinking_variables, with_thought_limit
from isotherm.cluster.api.tool_use import call_constraint, call_parsers, constrains_calls
from isotherm.cluster.messages.requests import Constraint
from isotherm.cluster.text.chat_template import ChatTemplateBrokenError, ChatTemplateError
from isotherm.cluster.text.output import OutputParser
from isotherm.cluster.text.output_parsers import ThoughtAndCalls
from isotherm.cluster.text.template_traits import TemplateTraits
from isotherm.cluster.text.think_parser import THOUGHT_END
from isotherm.cluster.text.tokenizer import ChatPrompt, NoChatTemplateError, Tokenizer


def prepare_chat(raw: bytes, reply_id: str, served: Served) -> Prepared:
    """The requests for a body of /v1/chat/completions. Raises ReplyError."""
    return prepare_chat_body(parse_body(ChatBody, raw), reply_id, served)


def prepare_chat_body(body: ChatBody, reply_id: str, served: Served) -> Prepared:
    """As `prepare_chat`, for a body that is checked already: other routes' bodies are made into chats. Raises
    ReplyError."""
    prompt = chat_prompt(body, served)
    constraint = _constraint(body, prompt, served)
    requests = generation_requests(body, [prompt.ids], ["messages"], reply_id, served, constraint)
    requests = with_thought_limit(requests, body, prompt, served.tokenizer)
    new_reply = partial(
        OpenAIReply,
        reply_id,
        body.model,
        chat=True,
        include_usage=body.include_usage,
        prompts=told_prompts(body, [prompt.ids]),
        calls_alone=body.must_call,
    )
    thought, calls = parser_for(body, prompt), call_parsers(body, served, reply_id)

    def new_parser(choice: int) -> OutputParser:
        return thought() if calls is None else ThoughtAndCalls(thought(), calls(choice))

    return Prepared(reply_id, body, requests, ("",) * (body.n or 1), new_parser, new_reply)


def chat_prompt(body: ChatBody, served: Served) -> ChatPrompt:
    """The prompt of a chat, which may be longer than the context. Raises ReplyError."""
    check_model(body.model, served.names)
    check_chars(sum(message.chars for message in body.messages), served.limits, "messages")
    # The template may add much.
    return encode_chat_body(body, served.tokenizer, lambda text: check_chars(len(text), served.limits, "messages"))


def _constraint(body: ChatBody, prompt: ChatPrompt, served: Served) -> Constraint | None:
    """What the output must be after the thought that the prompt has opened, if it has. Raises ReplyError."""
    after = _thought_end(body, prompt, served.tokenizer)
    if constrains_calls(body):
        return call_constraint(body, served, after)
    return output_constraint(body, served.tokenizer, served.limits.vocab_size, after)


def encode_chat_body(
    body: ChatBody, tokenizer: Tokenizer, check_text: Callable[[str], None] | None = None
) -> ChatPrompt:
    """The prompt of a chat; `check_text` is given its text before it costs a tokenisation. Raises ReplyError."""
    try:
        traits = _traits(body, tokenizer)
        return tokenizer.encode_chat(
            [message.for_template() for message in body.messages],
            body.template_tools,
            documents=body.documents,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=body.goes_on,
            template=body.chat_template,
            template_kwargs=thinking_variables(body, traits),
            check_text=check_text,
        )
    except NoChatTemplateError as error:
        raise ReplyError(str(error), param="messages") from None
    except ChatTemplateBrokenError as error:
        raise ReplyError(str(error), status=500, kind="server_error", headers=NOT_AGAIN) from None
    except ChatTemplateError as error:
        if trouble := _trouble(body, tokenizer):
            raise ReplyError(trouble, status=500, kind="server_error", headers=NOT_AGAIN) from None
        raise ReplyError(f"messages: the model's chat template refused them: {error}", param="messages") from None


def _trouble(body: ChatBody, tokenizer: Tokenizer) -> str:
    """Why the template for this chat could not tell any other one either; empty where it could."""
    try:
        return tokenizer.template_traits(body.chat_template, tools=body.template_tools is not None).trouble
    except ChatTemplateError as error:
        return str(error)


def _traits(body: ChatBody, tokenizer: Tokenizer) -> TemplateTraits:
    """Those of the template for this chat, which takes what the body has for it."""
    try:
        traits = tokenizer.template_traits(body.chat_template, tools=bool(body.tools))
    except ChatTemplateBrokenError:
        raise
    except ChatTemplateError as error:
        raise ReplyError(f"chat_template: {error}", param="chat_template") from None
    if body.callable_tools and not traits.supports_tools:
        raise ReplyError("tools: the model's chat template does not mention tools", param="tools")
    if body.documents and "documents" not in traits.variables:
        raise ReplyError("documents: the model's chat template does not mention documents", param="documents")
    return traits


def _thought_end(body: ChatBody, prompt: ChatPrompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token that ends the thought which the prompt has opened, if it has. Raises ReplyError where the output is to
    be structured after a thought whose end is no token."""
    if not prompt.in_thought:
        return ()
    if (token := tokenizer.token_id(THOUGHT_END)) is not None:
        return (token,)
    if body.structure is not None or constrains_calls(body):
        field = body.structure[0] if body.structure is not None else "tools"
        raise ReplyError(f"{field}: not with thinking: {THOUGHT_END} is no token of this model", param=field)
    return ()
