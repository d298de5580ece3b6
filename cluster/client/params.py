"""The request fields that clients take by keyword, typed. A server refuses or ignores what it does not know; what has
no name here goes into `extra_body`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

from isotherm.cluster.jsontypes import JSON

Messages = str | Sequence[Mapping[str, Any]]
Prompt = str | Sequence[Any]
Tool = Mapping[str, Any] | Callable[..., Any]


class GenerationParams(TypedDict, total=False):
    """What chats and completions share."""

    model: str  # the first that the server lists, where it is not given
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[str, float] | None
    bad_words: Sequence[str] | None
    seed: int | None
    n: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    prompt_logprobs: int | None
    return_token_ids: bool | None
    stream_options: Mapping[str, Any] | None
    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None
    guided_json: Any
    guided_regex: str | None
    guided_choice: Sequence[str] | None
    guided_grammar: str | None
    json_schema: Any
    regex: str | None
    ebnf: str | None
    grammar: str | None
    priority: int | None  # lower values have their turn first
    timeout: float | None  # seconds from the request's arrival at the server to its end
    user: str | None
    speculation: Literal["auto", "off"] | None
    extra_body: Mapping[str, Any]  # fields of the body that are not named here


class ChatParams(GenerationParams, total=False):
    """Of POST /v1/chat/completions."""

    max_completion_tokens: int | None
    max_thinking_tokens: int | None
    logprobs: bool | None
    top_logprobs: int | None
    tools: Sequence[Tool] | None  # functions, or entries as they are sent
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    thinking: bool | Mapping[str, Any] | None
    enable_thinking: bool | None
    thinking_budget: int | None
    reasoning: Mapping[str, Any] | None
    reasoning_effort: str | None
    include_reasoning: bool | None
    separate_reasoning: bool | None
    documents: Sequence[JSON] | None
    chat_template_kwargs: JSON | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None


class CompletionParams(GenerationParams, total=False):
    """Of POST /v1/completions."""

    logprobs: int | None
    echo: bool | None
    best_of: int | None
    suffix: str | None
    add_special_tokens: bool | None


class Copies(TypedDict):
    """How many groups are to hold an expert of a layer; None leaves it to the autoscaler, as it was before a number was
    set."""

    layer: int
    expert: int
    count: int | None


class RollTarget(TypedDict, total=False):
    """Of POST /admin/operations that brings other workers; None is as if it were not given."""

    expert_groups: int | None
    attention_shards: int | None
    deadline_seconds: float | None


class ScaleTarget(RollTarget, total=False):
    """Of POST /admin/operations that keeps those there are."""

    copies: Sequence[Copies] | None
    drain_nodes: Sequence[str] | None


Phase = Literal["planned", "preparing", "committing", "done", "rolling_back", "rolled_back", "failed"]
FINAL_PHASES: frozenset[Phase] = frozenset({"done", "rolled_back", "failed"})
AutoscalerMode = Literal["off", "advise", "on"]


class Operation(TypedDict):
    """What has become of a change of the cluster, as GET /admin/operations/ID gives it."""

    id: str
    phase: Phase
    target: JSON  # what there is to be
    origin: str  # who asked for it
    dry_run: bool
    idempotency_key: str | None
    progress: float  # 0 to 1
    plan: list[str]
    reasons: list[str]
    waiting: list[str]  # what it waits for now, in words
    created: float  # seconds since the epoch, as are those of `entered`
    seconds: dict[str, float]  # that each phase took which has ended
    entered: dict[str, float]


class ModelInfo(TypedDict, total=False):
    """What GET /v1/models/ID gives; servers of others have the first three alone."""

    id: str
    created: int
    owned_by: str
    root: str
    max_model_len: int  # prompt and output tokens together
    vocab_size: int
    default_sampling: JSON  # what requests that do not say ask for
