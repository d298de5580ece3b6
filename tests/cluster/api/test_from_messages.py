from __future__ import annotations

import time

import pytest

from isotherm.cluster.api.bodies.messages import Conversation, MessagesBody
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.from_messages import translate_messages
from isotherm.cluster.api.parse import checked

USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object"}


def translation(*messages, **fields):
    body = {"model": "m", "max_tokens": 9, "messages": list(messages) or [USER], **fields}
    return translate_messages(checked(MessagesBody, body))


def messages(*given, **fields):
    return translation(*given, **fields).chat["messages"]


def text(words):
    return {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}


def use(call_id):
    return {"type": "tool_use", "id": call_id, "name": "f", "input": {"a": "ü"}}


def result(call_id, content="7", **fields):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **fields}


def thinks(*thoughts):
    return {"role": "assistant", "content": [{"type": "thinking", "thinking": words} for words in thoughts]}


def cleared(keep=None):
    edit = {"type": "clear_thinking_20251015"} | ({} if keep is None else {"keep": keep})
    return {"context_management": {"edits": [edit]}}


def last(count):
    return {"type": "thinking_turns", "value": count}


def parts(*texts):
    return [{"type": "text", "text": words} for words in texts]


def test_plain_messages_and_a_system_prompt():
    assert messages(USER, system="be brief") == [{"role": "system", "content": "be brief"}, USER]
    assert messages(USER, system=[text("a"), text("b")])[0]["content"] == parts("a", "b")
    assert messages(USER, system="") == messages(USER, system=[]) == [USER]


def test_blocks_become_turns_calls_and_results():
    assert messages(
        {"role": "user", "content": [text("what"), text("is it?")]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                text("let me see"),
                use("a"),
                use("b"),
            ],
        },
        {"role": "user", "content": [result("a"), result("b", [text("1"), text("2")]), text("go on")]},
        {"role": "user", "content": "please"},
    ) == [
        {"role": "user", "content": parts("what", "is it?")},
        {
            "role": "assistant",
            "content": "let me see",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": id_, "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}} for id_ in "ab"
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "7"},
        {"role": "tool", "tool_call_id": "b", "content": parts("1", "2")},
        {"role": "user", "content": parts("go on", "please")},
    ]


def test_results_that_are_errors_or_empty():
    calls = {"role": "assistant", "content": [use("a")]}

    def came(content, **fields):
        return messages(USER, calls, {"role": "user", "content": [result("a", content, **fields)]})[-1]["content"]

    assert came(None) == came([]) == ""
    assert came("no such file", is_error=True) == "Error: no such file"
    assert came([text("no"), text("file")], is_error=True) == parts("Error:", "no", "file")
    assert messages(USER, calls, {"role": "user", "content": [result("a")]})[1]["content"] is None


def test_what_a_tool_shows_is_told_of_and_not_shown():
    """As Claude Code sends back an image that it has read: refused, its session could not go on."""
    calls = {"role": "assistant", "content": [use("a")]}
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}

    def came(content, **fields):
        return messages(USER, calls, {"role": "user", "content": [result("a", content, **fields)]})[-1]["content"]

    assert came([image]) == "[image not shown: this model reads text only]"
    document = {"type": "document", "source": {"type": "url", "url": "https://a.example/b.pdf"}}
    assert came([text("a.png:"), image, document]) == parts(
        "a.png:", "[image not shown: this model reads text only]", "[document not shown: this model reads text only]"
    )
    assert came([image], is_error=True) == "Error: [image not shown: this model reads text only]"


def test_a_chat_that_ends_with_the_assistants_words_goes_on_with_them():
    assert "continue_final_message" not in translation().chat
    chat = translation(USER, {"role": "assistant", "content": "The answer is ("}).chat
    assert (chat["continue_final_message"], chat["add_generation_prompt"]) == (True, False)
    assert chat["messages"][-1] == {"role": "assistant", "content": "The answer is ("}
    with pytest.raises(ReplyError, match="tool_result"):
        translation(USER, {"role": "assistant", "content": [text("x"), use("a")]})


def test_tools_and_the_choice_among_them():
    examples = {"input_examples": [{"a": 1}], "allowed_callers": ["direct"], "eager_input_streaming": True}
    tools = [
        {"name": "f", "description": "d", "input_schema": SCHEMA},
        {"name": "g", "input_schema": SCHEMA, **examples},
    ]
    there = translation(tools=tools, tool_choice={"type": "tool", "name": "g", "disable_parallel_tool_use": True})
    assert there.chat["tools"][0]["function"] == {"name": "f", "description": "d", "parameters": SCHEMA}
    assert there.chat["tools"][1]["function"]["parameters"] == {**SCHEMA, "examples": [{"a": 1}]}
    assert there.chat["tool_choice"] == {"type": "function", "function": {"name": "g"}}
    assert there.chat["parallel_tool_calls"] is False
    error = ReplyError("x", param="tools[1].function.parameters.type")
    assert there.at_origin(error).param == "tools[1].input_schema.type"
    for kind, word in (("auto", "auto"), ("any", "required"), ("none", "none")):
        assert translation(tools=tools, tool_choice={"type": kind}).chat["tool_choice"] == word


def test_sampling_thinking_and_output():
    chat = translation(
        stop_sequences=["x"],
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        metadata={"user_id": "someone"},
        thinking={"type": "enabled", "budget_tokens": 8},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
        stream=True,
        seed=4,
    ).chat
    del chat["messages"], chat["model"]
    assert chat == {
        "stop": ["x"],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "user": "someone",
        "thinking": {"type": "enabled", "budget_tokens": 8},
        "reasoning_effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "response", "schema": SCHEMA, "strict": True},
        },
        "stream": True,
        "seed": 4,
    }
    chat = translation(thinking={"type": "disabled"}, output_config={"effort": "high"}).chat
    assert chat["thinking"] == {"type": "disabled"} and "reasoning_effort" not in chat
    chat = translation(output_config={"effort": "high"}).chat
    assert (chat["thinking"], chat["reasoning_effort"]) == ({"type": "adaptive"}, "high"), "an offer"
    chat = translation(output_config={"effort": "none"}).chat
    assert chat["reasoning_effort"] == "none" and chat.get("thinking") is None
    chat = translation(thinking={"type": "adaptive", "display": "summarized"}, chat_template_kwargs={"x": 1}).chat
    assert (chat["thinking"], chat["chat_template_kwargs"]) == ({"type": "adaptive"}, {"x": 1})
    assert translation(thinking={"type": "adaptive", "display": "omitted"}).chat["include_reasoning"] is False


def test_where_tokens_are_counted_only_what_makes_the_prompt_counts():
    body = checked(
        Conversation,
        {"model": "m", "messages": [USER], "max_tokens": 5, "temperature": 99, "chat_template_kwargs": {"x": 1}},
    )
    assert translate_messages(body).chat == {"model": "m", "messages": [USER], "chat_template_kwargs": {"x": 1}}


REFUSED = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [use("a")]}]}, "messages[0].content[0].type"),
    (
        {"messages": [{"role": "user", "content": [result("a", [{"type": "search_result"}])]}]},
        "messages[0].content[0].content[0].type",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "redacted_thinking"}]}]},
        "messages[1].content[0].type",
    ),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
    ({"tools": [{"name": "f", "input_schema": SCHEMA, "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [{"name": "f", "input_schema": SCHEMA, "allowed_callers": ["x"]}]}, "tools[0].allowed_callers[0]"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking.budget_tokens"),
    (cleared(last(0)), "context_management.edits[0].keep.value"),
    (cleared({"type": "some"}), "context_management.edits[0].keep.type"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type"),
    ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "context_management.edits[0].type"),
    ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"container": "c"}, "container"),
    ({"stop": ["x"]}, "stop"),
    ({"user": "x"}, "user"),
    ({"n": 2}, "n"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"return_token_ids": True}, "return_token_ids"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_honoured_is_refused_by_name(fields, param):
    body = {"model": "m", "max_tokens": 9, "messages": [USER], **fields}
    with pytest.raises(ReplyError) as info:
        checked(MessagesBody, {name: value for name, value in body.items() if value is not None})
    assert info.value.param == param and param.rpartition(".")[2].partition("[")[0] in info.value.message


@pytest.mark.parametrize(
    ("keep", "thoughts"),
    [
        ("all", ["a", "b", "c", "d"]),
        ({"type": "all"}, ["a", "b", "c", "d"]),
        (last(9), ["a", "b", "c", "d"]),
        (last(3), ["a", "b", "c", "d"]),
        (last(2), [None, "b", "c", "d"]),
        (last(1), [None, None, None, "d"]),
        (None, [None, None, None, "d"]),
    ],
)
def test_thoughts_are_told_of_the_last_turns_that_keep_theirs(keep, thoughts):
    """A turn goes on over the results of its tools, and over what Claude Code says beside them."""
    using = thinks("b")
    using["content"].append(use("u"))
    results = {"role": "user", "content": [result("u"), text("a reminder")]}
    middle = {"role": "system", "content": "be quick"}
    given = [USER, thinks("a"), USER, using, results, middle, thinks("c"), USER, thinks("d"), USER]
    turns = messages(*given, **cleared(keep))
    assert [t.get("reasoning_content") for t in turns if t["role"] == "assistant"] == thoughts
    body = {"model": "m", "messages": given, **cleared(keep)}
    assert translate_messages(checked(Conversation, body)).chat["messages"] == turns, "where tokens are counted"


@pytest.mark.parametrize(
    "system",
    [
        f"x-anthropic-billing-header: cc_version=2.1.177; cc_entrypoint=cli; cch={cch};\nYou are an agent.\nBe brief."
        for cch in ("36ee5", "0aaa9")
    ],
)
def test_what_is_for_anthropics_books_is_not_told(system):
    """It is another line in each request, so nothing behind it was found in the prefix cache."""
    billing, _, rest = system.partition("\n")
    told = {"role": "system", "content": rest}
    assert messages(USER, system=system) == [told, USER]
    assert messages(USER, system=[text(billing), text(rest)]) == [told, USER]
    assert messages(USER, system=[text(system)]) == [told, USER]
    assert messages(USER, system=[text(billing)]) == messages(USER, system=billing) == [USER]
    assert messages(USER, system=[text(rest), text("")])[0]["content"] == parts(rest, "")
    asked = {"role": "user", "content": billing}
    assert messages(asked) == [asked], "what a user asks about it"


def test_what_agents_send_and_asks_for_nothing_is_taken():
    translation(
        cache_control={"type": "ephemeral"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        mcp_servers=[],
        service_tier="priority",
        betas=["x"],
    )


def test_a_conversation_has_its_turns():
    """The second user's words were put into the assistant's turn."""
    said = [("user", "hi"), ("assistant", "hello"), ("user", "how"), ("assistant", "so"), ("user", "bye")]
    turns = messages(*({"role": role, "content": words} for role, words in said))
    assert [(turn["role"], turn["content"]) for turn in turns] == said


def test_many_blocks_take_time_in_proportion():
    begin = time.process_time()
    (turn,) = messages({"role": "user", "content": [text("x")] * 20_000})
    assert len(turn["content"]) == 20_000 and time.process_time() - begin < 5


def test_counted_is_what_the_prompt_depends_on():
    said = {"enable_thinking": False, "documents": [{"title": "t"}], "chat_template_kwargs": {"a": 1}}
    counted = translate_messages(checked(Conversation, {"model": "m", "messages": [USER], **said, "seed": 3})).chat
    assert said.items() <= counted.items() and "seed" not in counted
