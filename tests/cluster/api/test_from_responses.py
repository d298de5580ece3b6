from __future__ import annotations

import pytest

from isotherm.cluster.api.bodies.responses import ResponsesBody
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.from_responses import sealed_thought, translate_responses
from isotherm.cluster.api.function_names import FunctionNames
from isotherm.cluster.api.parse import checked

TOOLS = [{"type": "function", "name": name, "parameters": {"type": "object"}, "strict": True} for name in "fgh"]


def translation(**fields):
    body = checked(ResponsesBody, {"model": "m", "input": "hi", **fields})
    items = [(body.input_param(i), item) for i, item in enumerate(body.items)]
    return translate_responses(body, items, FunctionNames(body.functions))


def messages(*items):
    return translation(input=list(items)).chat["messages"]


def said(role, text, kind="input_text"):
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def thought(text):
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def call(call_id):
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"}


def came(call_id, output="7"):
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def chat_call(call_id):
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_a_string_and_instructions():
    chat = translation(instructions="be brief", seed=3, min_p=0.1, unknown=1).chat
    assert chat == {
        "model": "m",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "seed": 3,
        "min_p": 0.1,
    }


def test_the_assistants_items_that_follow_each_other_are_one_turn():
    assert messages(
        said("user", "what?"),
        thought("hm"),
        said("assistant", "let me see", "output_text"),
        call("a"),
        call("b"),
        came("a"),
        came("b", [{"type": "input_text", "text": "1"}, {"type": "input_text", "text": "2"}]),
        thought("so"),
        said("assistant", "it is 7", "output_text"),
        {"role": "developer", "content": "be nice"},
    ) == [
        {"role": "user", "content": "what?"},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": "let me see",
            "tool_calls": [chat_call("a"), chat_call("b")],
        },
        {"role": "tool", "tool_call_id": "a", "content": "7"},
        {
            "role": "tool",
            "tool_call_id": "b",
            "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}],
        },
        {"role": "assistant", "reasoning_content": "so", "content": "it is 7"},
        {"role": "developer", "content": "be nice"},
    ]


def test_turns_that_are_not_one():
    assert messages(said("assistant", "a", "output_text"), said("assistant", "b", "output_text")) == [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert messages(call("a"), said("assistant", "b", "output_text")) == [
        {"role": "assistant", "content": "b", "tool_calls": [chat_call("a")]}
    ]
    refused = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert messages(refused) == [{"role": "assistant", "content": "no"}]
    assert messages({"role": "assistant", "content": []}) == [{"role": "assistant", "content": ""}]


def test_what_comes_between_a_call_and_its_output_is_one_turn():
    """The output would follow a turn that has not asked for it."""
    first, second = said("assistant", "look", "output_text"), said("assistant", "well", "output_text")
    assert messages(first, call("a"), second, came("a")) == [
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "look"}, {"type": "text", "text": "well"}],
            "tool_calls": [chat_call("a")],
        },
        {"role": "tool", "tool_call_id": "a", "content": "7"},
    ]
    assert messages(thought("hm"), call("a"), thought("so"), second, call("b"), came("a"), came("b"))[:1] == [
        {
            "role": "assistant",
            "content": "well",
            "reasoning_content": "hm\n\nso",
            "tool_calls": [chat_call("a"), chat_call("b")],
        }
    ]
    turns = messages(first, call("a"), came("a"), second, call("b"), came("b"))
    assert [turn["role"] for turn in turns] == ["assistant", "tool", "assistant", "tool"]


def test_what_a_call_gave_that_is_no_text_is_told_of_and_not_shown():
    """As Codex sends back an image that it has viewed: refused, its session could not go on."""
    image = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo=", "detail": "high"}
    told = "[image not shown: this model reads text only]"
    assert messages(call("a"), came("a", [image]))[-1]["content"] == told
    parts = [{"type": "input_text", "text": "a.png:"}, image, {"type": "input_file", "file_id": "file-1"}]
    content = messages(call("a"), came("a", parts))[-1]["content"]
    assert [part["text"] for part in content] == ["a.png:", told, "[file not shown: this model reads text only]"]


def test_thoughts_come_back_however_they_were_kept():
    sealed = {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": sealed_thought("höm")}
    summed = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "so"}]}
    empty = {"type": "reasoning", "id": "r", "summary": []}
    assert [messages(item, said("assistant", "x"))[0].get("reasoning_content") for item in (sealed, summed, empty)] == [
        "höm",
        "so",
        None,
    ]
    for foreign in ("gAAAA", "isotherm:?", "isotherm:/w=="):
        with pytest.raises(ReplyError) as info:
            messages(said("user", "x"), {**sealed, "encrypted_content": foreign})
        assert info.value.param == "input[1].encrypted_content" and info.value.status == 400


def test_tools_and_the_choice_among_them():
    chat = translation(tools=TOOLS, tool_choice={"type": "function", "name": "g"}, parallel_tool_calls=False).chat
    assert chat["tools"][1] == {
        "type": "function",
        "function": {"name": "g", "parameters": {"type": "object"}, "strict": True},
    }
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "g"}}
    assert chat["parallel_tool_calls"] is False
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "h"}]}
    there = translation(tools=TOOLS, tool_choice=allowed)
    assert [tool["function"]["name"] for tool in there.chat["tools"]] == ["h"]
    assert there.chat["tool_choice"] == "required"
    wrong = ReplyError("tools[0].function.name: no", param="tools[0].function.name")
    assert there.at_origin(wrong).param == "tools[2].name"
    with pytest.raises(ReplyError) as info:
        translation(tools=TOOLS, tool_choice={**allowed, "tools": [{"type": "function", "name": "z"}]})
    assert info.value.param == "tool_choice.tools[0].name"


def test_what_is_called_otherwise():
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    chat = translation(
        text={"format": schema, "verbosity": "low"},
        reasoning={"effort": "high", "summary": "auto"},
        max_output_tokens=9,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        safety_identifier="someone",
        stream=True,
    ).chat
    del chat["messages"], chat["model"]
    assert chat == {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        },
        "reasoning_effort": "high",
        "max_completion_tokens": 9,
        "logprobs": True,
        "top_logprobs": 2,
        "user": "someone",
        "stream": True,
    }
    plain = translation(text={"format": {"type": "text"}, "verbosity": "medium"}, include=[]).chat
    assert plain.keys() == {"model", "messages"}
    assert translation(text={"format": {"type": "json_object"}}).chat["response_format"] == {"type": "json_object"}


REFUSED = [
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    (
        {"input": [{"type": "function_call_output", "call_id": "a", "output": [{"type": "x"}]}]},
        "input[0].output[0].type",
    ),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [5]}, "input[0]"),
    ({"background": True}, "background"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"n": 2}, "n"),
    ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"tools": [{"type": "shell"}]}, "tools[0].type"),
    ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"tool_choice": "some"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
    ({"include": ["file_search_call.everything"]}, "include[0]"),
    ({"tools": [{"type": "namespace"}]}, "tools[0].name"),
    ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "shell"}]}]}, "tools[0].tools[0].type"),
    ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"metadata": {"k": 5}}, "metadata.k"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_honoured_is_refused_by_name(fields, param):
    with pytest.raises(ReplyError) as info:
        translation(**fields)
    assert info.value.param == param and param.rpartition(".")[2].partition("[")[0] in info.value.message


def test_what_openai_runs_itself_is_left_out():
    """As Codex offers it unasked; a function keeps its place in errors."""
    hosted = [{"type": "web_search", "external_web_access": False}, {"type": "image_generation"}]
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    made = translation(tools=[*hosted, function])
    assert [tool["function"]["name"] for tool in made.chat["tools"]] == ["f"]
    assert made.origins["tools[0].function"] == "tools[2]"
    assert translation(tools=hosted).chat.get("tools") is None


def test_what_is_asked_of_hosted_tools_is_taken_as_they_are():
    """As the AI SDK asks for sources wherever web search is offered."""
    included = ["web_search_call.action.sources", "web_search_call.results", "code_interpreter_call.outputs"]
    included += ["file_search_call.results", "message.input_image.image_url", "computer_call_output.output.image_url"]
    assert "logprobs" not in translation(tools=[{"type": "web_search"}], include=included).chat
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}
    named = {**allowed, "tools": [{"type": "web_search"}, {"type": "function", "name": "g"}]}
    made = translation(tools=[{"type": "web_search"}, *TOOLS], tool_choice=named)
    assert [tool["function"]["name"] for tool in made.chat["tools"]] == ["g"]
    alone = translation(tools=[{"type": "web_search"}, *TOOLS], tool_choice=allowed).chat
    assert "tools" not in alone and alone["tool_choice"] == "auto"


def agents(*names, **fields):
    """As Codex offers functions of one purpose, or of one MCP server."""
    tools = [{"type": "function", "name": name, "description": f"{name}s", "parameters": {}} for name in names]
    return {"type": "namespace", "name": "agents", "description": "of agents", "tools": tools, **fields}


def test_functions_of_a_namespace_are_offered_under_both_names():
    freeform = {"type": "custom", "name": "exec", "format": {"type": "text"}}
    empty, missing = agents(), {"type": "namespace", "name": "n"}
    there = agents("spawn", "wait")
    there["tools"].insert(1, freeform)
    made = translation(tools=[empty, TOOLS[0], there, missing])
    assert [tool["function"] for tool in made.chat["tools"]] == [
        {"name": "f", "parameters": {"type": "object"}, "strict": True},
        {"name": "agents__spawn", "description": "of agents\n\nspawns", "parameters": {}},
        {"name": "agents__wait", "description": "waits", "parameters": {}},
    ]
    wrong = ReplyError("tools[2].function.parameters: no", param="tools[2].function.parameters")
    assert made.at_origin(wrong).param == "tools[2].tools[2].parameters"
    assert "tools" not in translation(tools=[empty, missing]).chat


def test_calls_of_a_namespace_have_its_name_again():
    spawned = {**call("a"), "namespace": "agents", "name": "spawn"}
    gone = {**call("b"), "namespace": "gone"}
    (turn,) = translation(input=[spawned, gone], tools=[agents("spawn")]).chat["messages"]
    assert [one["function"]["name"] for one in turn["tool_calls"]] == ["agents__spawn", "gone__f"]


def test_a_choice_may_name_a_namespace_and_its_functions():
    tools = [TOOLS[0], agents("spawn", "wait", "f")]

    def choice(**fields):
        return translation(tools=tools, tool_choice=fields).chat["tool_choice"]

    named = {"type": "function", "function": {"name": "agents__spawn"}}
    assert choice(type="function", name="spawn") == choice(type="function", namespace="agents", name="spawn") == named
    assert choice(type="function", name="f")["function"] == {"name": "f"}
    allowed = [{"type": "function", "name": "f"}, {"type": "namespace", "name": "agents"}]
    for some, names in (
        (allowed, ["f", "agents__spawn", "agents__wait", "agents__f"]),
        (allowed[1:], ["agents__spawn", "agents__wait", "agents__f"]),
        ([{"type": "function", "namespace": "agents", "name": "f"}], ["agents__f"]),
    ):
        made = translation(tools=tools, tool_choice={"type": "allowed_tools", "mode": "auto", "tools": some})
        assert [tool["function"]["name"] for tool in made.chat["tools"]] == names
    with pytest.raises(ReplyError) as info:
        choice(type="function", namespace="agents", name="z")
    assert info.value.param == "tool_choice"


def test_values_that_ask_for_nothing_are_taken():
    translation(
        background=False, truncation="disabled", service_tier="flex", conversation=None, n=1, max_tool_calls=3, user="u"
    )
