"""A reply of /v1/responses: the response as an object, or the events of its making. Pure, but for `keep`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isotherm.cluster.api.choices import ChoiceDelta
from isotherm.cluster.api.errors import CONTEXT_LENGTH, ReplyError
from isotherm.cluster.api.from_responses import sealed_thought
from isotherm.cluster.api.parts import Part, PartKind, Parts, Step
from isotherm.cluster.api.replies import COMMENT, Usage, sse
from isotherm.cluster.jsontypes import JSON

_ID_KINDS = {PartKind.THOUGHT: "rs", PartKind.TEXT: "msg", PartKind.CALL: "fc"}


class ResponsesReply:
    """`said` is what the response repeats of its request; `keep` is called with the response once it is whole.
    `seals`: thoughts have an `encrypted_content` too. `logprobs`: texts have their tokens' log-probabilities.
    `summarises`: thoughts are their own summaries too. `says_function`: what a call says of the function that has this
    name in the chat."""

    waiting = COMMENT

    def __init__(
        self,
        response_id: str,
        said: JSON,
        keep: Callable[[JSON], None],
        created: int,
        system_fingerprint: str | None,
        *,
        seals: bool = False,
        logprobs: bool = False,
        summarises: bool = False,
        says_function: Callable[[str], JSON] = lambda name: {"name": name},
    ) -> None:
        self._id = response_id
        self._head = {
            "id": response_id,
            "object": "response",
            "created_at": created,
            "system_fingerprint": system_fingerprint,
            **said,
        }
        self._keep = keep
        self._seals = seals
        self._with_logprobs = logprobs
        self._summarises = summarises
        self._says_function = says_function
        self._parts = Parts()
        self._items: list[JSON] = []  # those that have ended
        self._number = 0  # of the next event
        self._finish_reason: str | None = None
        self._cuts_call = False
        self._unsaid: list[JSON] = []  # logprobs of tokens whose text is held back
        self._logprobs: dict[int, list[JSON]] = {}  # of a text, by its part's index

    def whole(self, choices: Sequence[ChoiceDelta], used: Usage) -> JSON:
        for delta in choices[0].pieces:
            self.events(delta)
        return self._finished(used)

    def events(self, delta: ChoiceDelta) -> bytes:
        begun = b"" if self._number else self._begin()
        if delta.logprobs is not None and self._with_logprobs:
            self._unsaid += delta.logprobs["content"][delta.thought_tokens :]
        events = [begun, *map(self._step, self._parts.feed(delta.fields))]
        if delta.finish_reason is not None:
            self._finish_reason, self._cuts_call = delta.finish_reason, delta.cuts_call
            events += map(self._step, self._parts.finish())
        return b"".join(events)

    def end(self, used: Usage) -> bytes:
        response = self._finished(used)
        return self._event(f"response.{response['status']}", {"response": response})

    def error(self, error: ReplyError) -> bytes:
        begun = b"" if self._number else self._begin()
        code = {429: "rate_limit_exceeded", 400: "invalid_prompt"}.get(error.status, "server_error")
        if error.code == CONTEXT_LENGTH:  # which Codex looks for, to make the conversation shorter
            code = CONTEXT_LENGTH
        failed = self._response("failed", error={"code": code, "message": error.message})
        return begun + self._event("response.failed", {"response": failed})

    def _finished(self, used: Usage) -> JSON:
        cut = self._finish_reason == "length" or self._cuts_call
        reason = "max_output_tokens" if self._finish_reason == "length" else self._finish_reason
        details = {"reason": reason} if cut else None
        response = self._response("incomplete" if cut else "completed", incomplete_details=details, usage=_usage(used))
        self._keep(response)
        return response

    def _response(self, status: str, **more: object) -> JSON:
        defaults = {"error": None, "incomplete_details": None, "usage": None}
        return {**self._head, "status": status, "output": list(self._items), **defaults, **more}

    def _begin(self) -> bytes:
        response = {"response": self._response("in_progress")}
        return self._event("response.created", response) + self._event("response.in_progress", response)

    def _step(self, step: Step) -> bytes:
        if step.what == "begins":
            return self._part_begins(step.part)
        return self._part_grows(step.part, step.text) if step.what == "grows" else self._part_ends(step.part)

    def _part_begins(self, part: Part) -> bytes:
        if part.kind is PartKind.CALL:
            self._unsaid = []  # a call has none
        added = self._of_item(part, "response.output_item.added", {"item": self._item(part, "in_progress")})
        if part.kind is PartKind.CALL:
            return added
        added += self._of_content(part, "response.content_part.added", {"part": _content(part.kind, "", [])})
        return added + self._of_summary(part, "part.added", {"part": _summary("")})

    def _part_grows(self, part: Part, text: str) -> bytes:
        if part.kind is PartKind.CALL:
            self._unsaid = []
            return self._of_item(part, "response.function_call_arguments.delta", {"delta": text})
        if part.kind is PartKind.THOUGHT:
            grown = self._of_content(part, "response.reasoning_text.delta", {"delta": text})
            return grown + self._of_summary(part, "text.delta", {"delta": text})
        logprobs, self._unsaid = self._unsaid, []
        self._logprobs.setdefault(part.index, []).extend(logprobs)
        return self._of_content(part, "response.output_text.delta", {"delta": text, "logprobs": logprobs})

    def _part_ends(self, part: Part) -> bytes:
        cut = self._finish_reason == "length" or (self._cuts_call and part.kind is PartKind.CALL)
        item = self._item(part, "incomplete" if cut else "completed")
        self._items.append(item)
        if part.kind is PartKind.CALL:
            said = {**self._says_function(part.name), "arguments": part.text}
            events = self._of_item(part, "response.function_call_arguments.done", said)
        else:
            content = self._whole_content(part)
            said = {name: content[name] for name in ("text", "logprobs") if name in content}
            kind = "reasoning_text" if part.kind is PartKind.THOUGHT else "output_text"
            events = self._of_content(part, f"response.{kind}.done", said)
            events += self._of_content(part, "response.content_part.done", {"part": content})
            events += self._of_summary(part, "text.done", {"text": part.text})
            events += self._of_summary(part, "part.done", {"part": _summary(part.text)})
        return events + self._of_item(part, "response.output_item.done", {"item": item})

    def _item(self, part: Part, status: str) -> JSON:
        """The part as an item; what it says comes when it has ended."""
        head = {"id": self._item_id(part), "status": status}
        begun = status == "in_progress"
        if part.kind is PartKind.CALL:
            call = {"call_id": part.call_id, **self._says_function(part.name)}
            return {**head, "type": "function_call", **call, "arguments": "" if begun else part.text}
        content = [] if begun else [self._whole_content(part)]
        if part.kind is PartKind.TEXT:
            return {**head, "type": "message", "role": "assistant", "content": content}
        sealed = {"encrypted_content": sealed_thought(part.text)} if self._seals and not begun else {}
        summary = [_summary(part.text)] if self._summarises and not begun else []
        return {**head, "type": "reasoning", "summary": summary, "content": content, **sealed}

    def _whole_content(self, part: Part) -> JSON:
        return _content(part.kind, part.text, self._logprobs.get(part.index, []))

    def _item_id(self, part: Part) -> str:
        return item_id(_ID_KINDS[part.kind], self._id, str(part.index))

    def _of_item(self, part: Part, kind: str, fields: JSON) -> bytes:
        of = {} if "item" in fields else {"item_id": self._item_id(part)}
        return self._event(kind, {**of, "output_index": part.index, **fields})

    def _of_content(self, part: Part, kind: str, fields: JSON) -> bytes:
        return self._of_item(part, kind, {"content_index": 0, **fields})

    def _of_summary(self, part: Part, what: str, fields: JSON) -> bytes:
        """Nothing, but of a thought where its summary is asked for."""
        if part.kind is not PartKind.THOUGHT or not self._summarises:
            return b""
        return self._of_item(part, f"response.reasoning_summary_{what}", {"summary_index": 0, **fields})

    def _event(self, kind: str, fields: JSON) -> bytes:
        number, self._number = self._number, self._number + 1
        return sse({"type": kind, "sequence_number": number, **fields}, kind)


def _content(kind: PartKind, text: str, logprobs: list[JSON]) -> JSON:
    if kind is PartKind.THOUGHT:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _summary(thought: str) -> JSON:
    return {"type": "summary_text", "text": thought}


def item_id(kind: str, response_id: str, index: str) -> str:
    """The id of one of a response's items, which says whose it is."""
    return f"{kind}_{response_id.removeprefix('resp_')}_{index}"


def _usage(used: Usage) -> JSON:
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        "total_tokens": used.prompt_tokens + used.completion_tokens,
    }
