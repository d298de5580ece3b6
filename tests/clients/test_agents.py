"""Frameworks for agents, as their own documentation uses them: each calls a tool and gives an answer of a type."""

from __future__ import annotations

import asyncio

import openai
import pytest
from pydantic import BaseModel

QUESTION = "Use add to compute 3 + 4."  # what is that small it says without a tool
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "number", "description": "First number"},
                "b": {"type": "number", "description": "Second number"},
            },
            "required": ["a", "b"],
        },
    },
}


class Sum(BaseModel):
    total: int


def test_litellm(url):
    import litellm

    asked = {"model": "openai/tiny", "api_base": url, "api_key": "none", "temperature": 0}
    messages = [{"role": "user", "content": QUESTION}]
    reply = litellm.completion(**asked, messages=messages, tools=[TOOL])
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "add" and reply.choices[0].finish_reason == "tool_calls"
    whole = litellm.stream_chunk_builder(
        list(litellm.completion(**asked, messages=messages, tools=[TOOL], stream=True)), messages=messages
    )
    assert whole.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    typed = litellm.completion(**asked, messages=messages, response_format=Sum)
    Sum.model_validate_json(typed.choices[0].message.content)


def test_langchain(url):
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def add(a: float, b: float) -> float:
        """Add two numbers."""
        return a + b

    model = ChatOpenAI(base_url=url, api_key="none", model="tiny", temperature=0)
    said = model.bind_tools([add]).invoke(QUESTION)
    assert [call["name"] for call in said.tool_calls] == ["add"]
    assert isinstance(add.invoke(said.tool_calls[0]["args"]), float)
    assert isinstance(model.with_structured_output(Sum).invoke(QUESTION), Sum)
    assert isinstance(model.with_structured_output(Sum, method="function_calling").invoke(QUESTION), Sum)


def test_pydantic_ai(url):
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=url, api_key="none"))
    called: list[tuple[float, float]] = []
    agent = Agent(model, model_settings={"temperature": 0})

    @agent.tool_plain
    def add(a: float, b: float) -> float:
        """Add two numbers."""
        called.append((a, b))
        return a + b

    answer = asyncio.run(agent.run(QUESTION))
    assert called and isinstance(answer.output, str)
    for output in (Sum, NativeOutput(Sum)):
        typed = Agent(model, output_type=output, model_settings={"temperature": 0})
        assert isinstance(asyncio.run(typed.run(QUESTION)).output, Sum)


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_openai_agents(url, api):
    import agents

    client = openai.AsyncOpenAI(base_url=url, api_key="none")
    kinds = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}
    model = kinds[api](model="tiny", openai_client=client)
    agents.set_tracing_disabled(True)
    called: list[tuple[float, float]] = []

    @agents.function_tool
    def add(a: float, b: float) -> float:
        """Add two numbers."""
        called.append((a, b))
        return a + b

    settings = agents.ModelSettings(temperature=0)
    agent = agents.Agent(name="sums", model=model, tools=[add], model_settings=settings)
    result = asyncio.run(agents.Runner.run(agent, QUESTION))
    assert called and isinstance(result.final_output, str)
    typed = agents.Agent(name="typed", model=model, output_type=Sum, model_settings=settings)
    assert isinstance(asyncio.run(agents.Runner.run(typed, QUESTION)).final_output, Sum)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA", "TOOLS_STRICT"])
def test_instructor(url, mode):
    import instructor

    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none"), mode=instructor.Mode[mode])
    messages = [{"role": "user", "content": QUESTION}]
    asked = {"model": "tiny", "messages": messages, "temperature": 0, "max_retries": 0}
    assert isinstance(client.chat.completions.create(response_model=Sum, **asked), Sum)
