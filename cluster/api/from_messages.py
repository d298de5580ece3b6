"""From a body of Anthropic's /v1/messages to a chat. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.common import UnshownPart
from isotherm.cluster.api.bodies.messages import (
    AssistantMessage,
    Conversation,
    MessageParam,
    MessagesBody,
    SystemMessage,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
)
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.translation import Translation, function_call, function_tool, text_parts
from isotherm.cluster.jsontypes import JSON

_BILLING = "x-anthropic-billing-header:"  # begins a line that is for nobody's eyes
_OF_THE_PROMPT = frozenset(
    {"chat_template", "chat_template_kwargs", "documents", "enable_thinking", "max_thinking_tokens", "reasoning"}
    | {"thinking_budget"}
)


def translate_messages(body: Conversation) -> Translation:
    """The chat for a body of either route; a MessagesBody's says how it is sampled too. Raises ReplyError."""
    turns = _Turns(_thoughts_begin(body.messages, body.thinking_turns))
    if system := _system(body.system or ""):
        turns.say("system", {"role": "system", "content": _texts(system)})
    for i, message in enumerate(body.messages):
        turns.add(i, message)
    turns.end()
    choice, thinking = body.tool_choice, body.thinking
    chat: JSON = {
        **_passed(body),
        "model": body.model,
        "messages": turns.messages,
        **_continuation(body.messages),
        "tools": [function_tool(t.name, t.description, t.parameters, t.strict) for t in body.tools or ()] or None,
        "tool_choice": _choice(body),
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "thinking": _thinking(body),
        "include_reasoning": False if thinking is not None and thinking.display == "omitted" else None,
        **_output(body),
        **(_sampling(body) if isinstance(body, MessagesBody) else {}),
    }
    origins = {
        **turns.origins,
        "add_generation_prompt": "messages",
        "continue_final_message": "messages",
        "include_reasoning": "thinking.display",
        "stop": "stop_sequences",
        "tool_choice.function": "tool_choice",
        "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
        "reasoning_effort": "output_config.effort",
        "response_format": "output_format" if body.output_format else "output_config.format",
        "user": "metadata.user_id",
    }
    origins["response_format.json_schema"] = origins["response_format"]
    for i in range(len(body.tools or ())):
        origins[f"tools[{i}].function"] = f"tools[{i}]"
        origins[f"tools[{i}].function.parameters"] = f"tools[{i}].input_schema"
    return Translation({name: value for name, value in chat.items() if value is not None}, origins)


def _system(system: str | Sequence[TextBlock]) -> str | list[TextBlock]:
    """Without the line that Claude Code puts before its instructions, or in a block before them, which is for
    Anthropic's books: it is another one in each request, so that nothing behind it would be found in the prefix
    cache."""
    if isinstance(system, str):
        return _unbilled(system)
    texts = [(block.text, _unbilled(block.text)) for block in system]
    return [TextBlock(type="text", text=text) for given, text in texts if text or not given]


def _unbilled(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(_BILLING) else text


def _thoughts_begin(messages: Sequence[MessageParam], turns: int | None) -> int:
    """The index of the first message whose thoughts are told, where so many of the assistant's last turns keep theirs.
    A turn goes on over the results of its tools."""
    if turns is None:
        return 0
    answered = False  # the turn that has come last has words of the assistant's
    for i in range(len(messages) - 1, -1, -1):
        message = messages[i]
        if isinstance(message, AssistantMessage):
            answered = True
        elif answered and isinstance(message, UserMessage) and not message.has_results:
            turns, answered = turns - 1, False
            if turns == 0:
                return i
    return 0


class _Turns:
    """Makes messages of messages made of blocks. Those of one role that follow each other are one turn, as Anthropic
    has it. Thoughts before the message of index `thoughts_begin` are left out."""

    def __init__(self, thoughts_begin: int) -> None:
        self._thoughts_begin = thoughts_begin
        self.messages: list[JSON] = []
        self.origins: dict[str, str] = {}
        self._texts: list[str] = []  # of the turn that the last message is; they become its content when it ends

    def add(self, index: int, message: MessageParam) -> None:
        """The next of a body's messages."""
        param = f"messages[{index}]"
        if isinstance(message, UserMessage):
            for i, block in enumerate(message.blocks):
                self._add_of_user(_block_param(param, message.content, i), block)
        elif isinstance(message, AssistantMessage):
            self._add_of_assistant(param, message, thinks=index >= self._thoughts_begin)
        else:
            assert isinstance(message, SystemMessage), message
            self.say(param, {"role": "system", "content": _texts(message.content)})

    def end(self) -> None:
        """What is still to be said of the last message."""
        if self._texts:
            self.messages[-1]["content"] = text_parts(self._texts)
        self._texts = []

    def say(self, param: str, message: JSON) -> None:
        self.end()
        self.origins[f"messages[{len(self.messages)}]"] = param
        self.messages.append(message)

    def _add_of_user(self, param: str, block: Any) -> None:
        if isinstance(block, ToolResultBlock):
            content = _texts(block.content or "")
            if block.is_error:  # a chat has no other place for it
                content = f"Error: {content}" if isinstance(content, str) else text_parts(["Error:", *_list(block)])
            self.say(param, {"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
            return
        assert isinstance(block, TextBlock), block
        if not self._texts or self.messages[-1]["role"] != "user":
            self.say(param, {"role": "user"})
        self._texts.append(block.text)

    def _add_of_assistant(self, param: str, message: AssistantMessage, thinks: bool) -> None:
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant":
            self.say(param, last := {"role": "assistant", "content": None})
        thoughts = []
        for i, block in enumerate(message.blocks):
            if isinstance(block, ToolUseBlock):
                calls = last.setdefault("tool_calls", [])
                at = f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"
                self.origins[at] = _block_param(param, message.content, i)
                calls.append(function_call(block.id, block.name, json.dumps(block.input, ensure_ascii=False)))
            elif isinstance(block, ThinkingBlock):
                thoughts += [block.thinking] if thinks else []
            else:
                assert isinstance(block, TextBlock), block
                self._texts.append(block.text)
        if thoughts:
            last["reasoning_content"] = last.get("reasoning_content", "") + "".join(thoughts)
        if not self._texts and not {"tool_calls", "reasoning_content"} & last.keys():
            last["content"] = ""


def _block_param(param: str, content: Any, index: int) -> str:
    return f"{param}.content" if isinstance(content, str) else f"{param}.content[{index}]"


def _texts(content: str | Sequence[TextBlock | UnshownPart]) -> str | list[JSON]:
    return content if isinstance(content, str) else text_parts([block.text for block in content])


def _list(block: ToolResultBlock) -> list[str]:
    content = block.content or ""
    return [content] if isinstance(content, str) else [part.text for part in content]


def _continuation(messages: Sequence[MessageParam]) -> JSON:
    """A chat that ends with the assistant's words goes on with them."""
    last = messages[-1]
    if not isinstance(last, AssistantMessage):
        return {}
    for i, block in enumerate(last.blocks):
        if isinstance(block, ToolUseBlock):
            param = f"messages[{len(messages) - 1}].content[{i}]"
            message = f"{param}: a tool_use block needs a tool_result block in the next message, and there is none"
            raise ReplyError(message, param=param)
    return {"add_generation_prompt": False, "continue_final_message": True}


def _passed(body: Conversation) -> JSON:
    """What the client gave under a chat's names; of it, where tokens are only counted, what the prompt depends on."""
    if isinstance(body, MessagesBody):
        return body.passed
    # What no chat may ask for is no more to be asked for here; the route's own fields for sampling are left out.
    refused = ChatBody.neutral.keys() - MessagesBody.model_fields.keys()
    return {name: value for name, value in body.passed.items() if name in _OF_THE_PROMPT or name in refused}


def _choice(body: Conversation) -> Any:
    choice = body.tool_choice
    if choice is None:
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


def _thinking(body: Conversation) -> JSON | None:
    """An effort alone offers a thought, to a model that has them."""
    if body.thinking is None:
        effort = None if body.output_config is None else body.output_config.effort
        return None if effort in (None, "none") else {"type": "adaptive"}
    return body.thinking.model_dump(exclude={"display"}, exclude_none=True)


def _output(body: Conversation) -> JSON:
    """A chat's effort is that of its thought, while Anthropic's is of all that is said: without a thought it is left to
    the model."""
    config, wanted = body.output_config, body.output_format
    thinks = body.thinking is None or body.thinking.type != "disabled"
    if config is not None:
        wanted = config.format or wanted
    schema = None if wanted is None else {"name": "response", "schema": wanted.schema_, "strict": True}
    return {
        "reasoning_effort": config.effort if config is not None and thinks else None,
        "response_format": None if schema is None else {"type": "json_schema", "json_schema": schema},
    }


def _sampling(body: MessagesBody) -> JSON:
    return {
        "stream": body.stream,
        "stop": body.stop_sequences or None,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "user": None if body.metadata is None else body.metadata.user_id,
    }
