"""OpenAI's replies of /v1/chat/completions and /v1/completions, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from isotherm.cluster.api.choices import ChoiceDelta
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.logprobs import joined_entries
from isotherm.cluster.api.replies import COMMENT, Usage, sse
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.output import OutputFields, ToolCallPiece

_DONE = b"data: [DONE]\n\n"


@dataclass
class OpenAIReply:
    """The JSON of one reply, whole or in chunks."""

    id: str
    model: str
    created: int  # seconds since the epoch
    system_fingerprint: str | None
    chat: bool
    include_usage: bool = False
    prompts: Sequence[list[int]] | None = None  # of each choice, where token ids are asked for
    calls_alone: bool = False  # there will be no content
    _begun: set[int] = field(default_factory=set)

    waiting = COMMENT

    def whole(self, choices: Sequence[ChoiceDelta], used: Usage) -> JSON:
        bodies = [
            {
                "index": delta.index,
                **({"message": _message(delta.fields)} if self.chat else {"text": delta.fields.content}),
                "logprobs": _logprobs(delta),
                "finish_reason": delta.finish_reason,
                **({} if self.chat else self._of_prompt(delta)),
                **({} if self.prompts is None else {"token_ids": list(delta.token_ids)}),
            }
            for delta in choices
        ]
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": bodies,
            "usage": _usage(used),
            **(self._of_prompt(choices[0]) if self.chat else {}),
        }

    def events(self, delta: ChoiceDelta) -> bytes:
        chunks = self._chunks(delta)
        if delta.used is not None:
            chunks = [{**chunk, "usage": _usage(delta.used)} for chunk in chunks]
        return b"".join(sse(chunk, by_parts=delta.prompt is not None) for chunk in chunks)

    def end(self, used: Usage) -> bytes:
        return (sse(self._last_chunk(used)) if self.include_usage or used.timings is not None else b"") + _DONE

    def error(self, error: ReplyError) -> bytes:
        return sse(error.body())

    def _chunks(self, delta: ChoiceDelta) -> list[JSON]:
        """The chunks for one delta: before a chat choice's first the one with its role, then one for each field that is
        set (some clients look at one alone), two where a tool call begins, as OpenAI has it: one with its name and one
        with arguments, and the finish reason in one of its own. The logprobs are in the first that has a
        field, and where no text is final yet in one with an empty content."""
        index, logprobs, out = delta.index, _logprobs(delta), []
        begins = index not in self._begun
        told = {} if self.prompts is None else {"token_ids": list(delta.token_ids)}
        if self.chat and begins:
            out += [self._first_chunk(earlier) for earlier in range(index + 1) if earlier not in self._begun]
            self._begun.update(range(index + 1))
        for body in self._bodies(delta):
            out.append(self._chunk(index, body, logprobs, told=told))
            logprobs, told = None, {}
        if delta.finish_reason is not None:
            out.append(self._chunk(index, {}, finish_reason=delta.finish_reason))
        if out and not self.chat:
            self._begun.add(index)
            if begins and self.prompts is not None:
                out[0]["choices"][0]["prompt_token_ids"] = self.prompts[index]
        return out

    def _first_chunk(self, index: int) -> JSON:
        """Of a choice of a chat: its role. Those of lower indices come before it, since OpenAI's own client appends
        what it has not seen, and then looks it up by its index."""
        content = None if self.calls_alone else ""
        chunk = self._chunk(index, {"role": "assistant", "content": content, "refusal": None})
        return chunk if self.prompts is None else {**chunk, "prompt_token_ids": self.prompts[index]}

    def _of_prompt(self, delta: ChoiceDelta) -> JSON:
        """What is told of a choice's prompt, in vLLM's words."""
        told: JSON = {} if self.prompts is None else {"prompt_token_ids": self.prompts[delta.index]}
        if delta.prompt is not None and delta.prompt.by_token is not None:
            told["prompt_logprobs"] = list(delta.prompt.by_token)
        return told

    def _bodies(self, delta: ChoiceDelta) -> list[JSON]:
        fields = delta.fields
        bodies: list[JSON] = []
        if fields.reasoning:
            bodies.append(_reasoning(fields.reasoning))
        if fields.content:
            bodies.append({"content": fields.content})
        bodies += [{"tool_calls": [piece]} for call in fields.tool_calls for piece in _tool_call_pieces(call)]
        return bodies or ([{"content": ""}] if _logprobs(delta) is not None or delta.token_ids else [])

    def _last_chunk(self, used: Usage) -> JSON:
        """What was asked for about the reply as a whole."""
        about: JSON = {"usage": _usage(used) if self.include_usage else None}
        if used.timings is not None:
            about["timings"] = used.timings
        return {**self._head(self._chunk_object), "choices": [], **about}

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self,
        index: int,
        delta: JSON,
        logprobs: JSON | None = None,
        finish_reason: str | None = None,
        told: JSON | None = None,
    ) -> JSON:
        body: JSON = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        chunk = {
            **self._head(self._chunk_object),
            "choices": [{"index": index, **body, "logprobs": logprobs, "finish_reason": finish_reason, **(told or {})}],
        }
        return {**chunk, "usage": None} if self.include_usage else chunk

    def _head(self, kind: str) -> JSON:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def _logprobs(delta: ChoiceDelta) -> JSON | None:
    """Those of the echoed prompt, then those of the output."""
    echoed = None if delta.prompt is None else delta.prompt.entries
    return joined_entries([echoed, delta.logprobs])


def _usage(used: Usage) -> JSON:
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": used.reasoning_tokens,
            "accepted_prediction_tokens": used.accepted_tokens,
            "rejected_prediction_tokens": used.rejected_tokens,
        },
    }


def _message(fields: OutputFields) -> JSON:
    message: JSON = {"role": "assistant", "content": fields.content, "refusal": None}
    if fields.reasoning:
        message |= _reasoning(fields.reasoning)
    if fields.tool_calls:
        message |= {"content": fields.content or None, "tool_calls": [_tool_call(call) for call in fields.tool_calls]}
    return message


def _reasoning(text: str) -> JSON:
    """Under the name that DeepSeek's API and most clients use, and under the newer one of other servers."""
    return {"reasoning_content": text, "reasoning": text}


def _tool_call(call: ToolCallPiece) -> JSON:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tool_call_pieces(call: ToolCallPiece) -> list[JSON]:
    """Its id, type and name are said once, before the arguments."""
    begun = [{"index": call.index, **_tool_call(replace(call, arguments=""))}] if call.id else []
    return begun + ([{"index": call.index, "function": {"arguments": call.arguments}}] if call.arguments else [])
