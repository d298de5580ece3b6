"""Fields that are of one route and not of another: where what they ask for is given there. A client that gives one of
them on another route would believe that it counts."""

from __future__ import annotations

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"

_SYSTEM = "a message of role system"

# Field → the routes that do not have it, each with the field to give there instead, or the route to ask.
OTHER_ROUTES: dict[str, dict[str, str]] = {
    "messages": {COMPLETIONS: CHAT, RESPONSES: "input"},
    "prompt": {CHAT: "messages", RESPONSES: "input", MESSAGES: "messages"},
    "input": {CHAT: "messages", COMPLETIONS: "prompt", MESSAGES: "messages"},
    "system": {CHAT: _SYSTEM, COMPLETIONS: "prompt", RESPONSES: "instructions"},
    "instructions": {CHAT: _SYSTEM, COMPLETIONS: "prompt", MESSAGES: "system"},
    "previous_response_id": {CHAT: RESPONSES, COMPLETIONS: RESPONSES, MESSAGES: RESPONSES},
    "suffix": {CHAT: "", RESPONSES: "", MESSAGES: ""},
    "max_tokens": {RESPONSES: "max_output_tokens"},
    "max_completion_tokens": {COMPLETIONS: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"},
    "max_output_tokens": {CHAT: "max_tokens", COMPLETIONS: "max_tokens", MESSAGES: "max_tokens"},
    "stop": {MESSAGES: "stop_sequences"},
    "response_format": {RESPONSES: "text.format", MESSAGES: "output_config.format"},
    "text": {CHAT: "response_format", COMPLETIONS: "response_format", MESSAGES: "output_config.format"},
    "output_format": {CHAT: "response_format", COMPLETIONS: "response_format", RESPONSES: "text.format"},
    "output_config": {
        CHAT: "reasoning_effort and response_format",
        COMPLETIONS: "response_format",
        RESPONSES: "reasoning.effort and text.format",
    },
    "reasoning_effort": {COMPLETIONS: CHAT, RESPONSES: "reasoning.effort", MESSAGES: "output_config.effort"},
    "include": {CHAT: "logprobs", COMPLETIONS: "logprobs", MESSAGES: ""},
    "user": {MESSAGES: "metadata.user_id"},
    "parallel_tool_calls": {COMPLETIONS: CHAT, MESSAGES: "tool_choice.disable_parallel_tool_use"},
    "functions": {COMPLETIONS: CHAT, RESPONSES: "tools", MESSAGES: "tools"},
    "function_call": {COMPLETIONS: CHAT, RESPONSES: "tool_choice", MESSAGES: "tool_choice"},
    "chat_template": {COMPLETIONS: CHAT},
    "add_generation_prompt": {COMPLETIONS: CHAT},
}


def fields_of_other_routes(route: str) -> dict[str, str]:
    """The fields that the route does not have, each with what to do instead, in words; empty where there is nothing."""
    return {name: _words(without[route]) for name, without in OTHER_ROUTES.items() if route in without}


def _words(instead: str) -> str:
    return instead and (f"ask {instead}" if instead.startswith("/") else f"give {instead}")
