"""From an HTTP request that asks for tokens to its reply, whole or as a stream, whatever the route: places,
preparation, the engine's deltas, disconnects."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from functools import cached_property, partial

from starlette.requests import Request
from starlette.responses import Response

from isotherm.cluster.api.access.admit import metered
from isotherm.cluster.api.access.caller import caller_of
from isotherm.cluster.api.access.limits import allowed_models
from isotherm.cluster.api.behalf import claim_for, in_process_priority, on_behalf
from isotherm.cluster.api.bodies.structure import may_be_structured
from isotherm.cluster.api.body import read_body
from isotherm.cluster.api.choices import ChoiceDelta, ChoiceStream, GenerationError, OwnFaultError, best, merged
from isotherm.cluster.api.deadline import Deadline, DeadlineError, time_limit, timed_out
from isotherm.cluster.api.delta_streams import DeltaStreams
from isotherm.cluster.api.engine_client import EngineClient, EngineOverloadedError, EngineUnavailableError
from isotherm.cluster.api.entrance import Entrance
from isotherm.cluster.api.errors import ReplyError, internal_error, unavailable
from isotherm.cluster.api.logprobs import PromptScores
from isotherm.cluster.api.prepare import Prepared, PromptLimits, Served
from isotherm.cluster.api.replies import Reply, json_response, long_json_response, usage
from isotherm.cluster.api.request_book import OpenRequest, RequestBook
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.api.stream import EventStream, until_disconnect
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.cluster.text.tool_formats.base import ToolFormat
from isotherm.cluster.text.tool_formats.registry import chosen_format

logger = logging.getLogger(__name__)
_INLINE_BYTES = 16 * 1024  # a completions body up to this size is tokenised in well under a millisecond: no thread


@dataclass(frozen=True)
class GenerationRoute:
    """A route that asks for tokens: how the ids of its replies begin, and how its bodies are made ready."""

    prefix: str
    prepare: Callable[[bytes, str, Served], Prepared]
    blocks: bool = True  # `prepare` may take long, whatever the body's size


class Generator:
    """Answers requests for tokens, and counts those that are open."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        names: Sequence[str],
        settings: AppSettings,
        book: RequestBook | None = None,
    ) -> None:
        self._book = book or RequestBook()
        self._engine = engine
        self._tokenizer = tokenizer
        self._names = names
        self._settings = settings
        self._entrance = Entrance(engine)

    @cached_property
    def _tool_format(self) -> ToolFormat | None:
        return chosen_format(self._settings.tool_format, self._tokenizer.tool_template)

    def served_to(self, request: Request) -> Served:
        """The model as it is now, for whoever asks: its engine may have become another. Raises ReplyError 403 where
        the caller may not use it."""
        settings, length, caller = self._settings, self._engine.max_model_len, caller_of(request)
        limits = PromptLimits(length, self._engine.vocab_size, length * settings.max_prompt_chars_per_token)
        names = allowed_models(caller, self._names)
        return Served(names, self._tokenizer, limits, settings.defaults, self._tool_format, caller)

    async def reply(self, request: Request, route: GenerationRoute) -> Response:
        """The answer to a request for tokens. Raises ReplyError."""
        deadline = self._deadline(request)
        with ExitStack() as places:
            entry = places.enter_context(self._book.open(request))
            visit = self._entrance.enter(claim_for(request))  # before the body costs anything
            places.callback(visit.leave)
            try:
                prepared = await deadline.bound(self.prepared(request, route), "its body was being read")
            except DeadlineError as error:
                raise timed_out(error) from None
            visit.settle(prepared.requests)
            prepared = metered(request, prepared, places)
            reply = await self._answer(request, prepared, entry, deadline.sooner(prepared.body.timeout))
            if isinstance(reply, EventStream):
                reply.on_close(places.pop_all().close)
            reply.headers.update(visit.header())
            return reply

    def _deadline(self, request: Request) -> Deadline:
        """Rows of a batch have their batch's."""
        limit = None if in_process_priority(request) is not None else self._settings.request_timeout_s
        return Deadline(asyncio.get_running_loop().time(), limit).sooner(time_limit(request.headers))

    async def prepared(self, request: Request, route: GenerationRoute) -> Prepared:
        """The request's body, made ready for the engine. Raises ReplyError."""
        raw = await self.body(request)
        prepare = partial(route.prepare, raw, f"{route.prefix}{uuid.uuid4().hex}", self.served_to(request))
        inline = not route.blocks and len(raw) <= _INLINE_BYTES and not may_be_structured(raw)
        prepared = prepare() if inline else await asyncio.to_thread(prepare)
        return on_behalf(prepared, request, self._settings.shared_prefix_cache)

    async def body(self, request: Request) -> bytes:
        return await read_body(request, self._settings.max_body_bytes)

    async def _answer(self, request: Request, prepared: Prepared, entry: OpenRequest, deadline: Deadline) -> Response:
        body, fingerprint = prepared.body, self._engine.system_fingerprint
        prepared = prepared.bound(fingerprint)
        choices = [
            ChoiceStream(
                i,
                generation,
                self._tokenizer,
                prepared.new_parser(i),
                stop=body.stops,
                skip_special_tokens=body.skip_special_tokens is not False,
                logprob_form=prepared.logprob_form,
                echo=prepared.echo[i],
                include_stop=bool(body.include_stop_str_in_output),
                tells_token_ids=bool(body.return_token_ids),
                scores=self._scores(prepared, i),
            )
            for i, generation in enumerate(prepared.requests)
        ]
        entry.prepared(prepared, choices)
        reply = prepared.new_reply(int(time.time()), fingerprint or None)
        try:
            if not body.stream:
                collected = self._collect(prepared, choices, reply, entry, deadline)
                whole = await until_disconnect(request.receive, collected)
                if any(choice.scores_many for choice in choices):
                    return await long_json_response(whole, entry.watch.header())
                return json_response(whole, headers=entry.watch.header())
            events = self._events(prepared, choices, reply, entry, deadline)
            error_event = partial(self._error_event, entry, prepared.id, reply)
            stream = EventStream(events, error_event, self._settings.silence_s, reply.waiting)
            await stream.first_event(request.receive, self._settings.first_event_s)
            return stream
        except (EngineUnavailableError, GenerationError) as error:
            raise self._engine_error(error) from error

    def _scores(self, prepared: Prepared, index: int) -> PromptScores | None:
        """What takes the log-probabilities of a choice's prompt, where it is the one that asks for them."""
        body, request = prepared.body, prepared.requests[index]
        if request.params.prompt_logprobs is None:
            return None
        echo = prepared.echo[index] if body.echoes_logprobs else None
        top = body.prompt_logprobs
        return PromptScores(request.prompt, self._tokenizer, echo=echo, echo_top=body.logprob_count or 0, top=top)

    def _engine_error(self, error: EngineUnavailableError | GenerationError) -> ReplyError:
        if isinstance(error, DeadlineError):
            return timed_out(error)
        if isinstance(error, EngineOverloadedError):
            return self._entrance.overloaded(str(error))
        if isinstance(error, EngineUnavailableError):
            return unavailable(str(error) or "the model can't be served right now", self._settings.retry_after_s)
        if isinstance(error, OwnFaultError):
            return ReplyError(str(error), param=error.param)
        return ReplyError(str(error), status=500, kind="server_error", code="generation_failed")

    def _error_event(self, entry: OpenRequest, reply_id: str, reply: Reply, error: Exception) -> bytes:
        """What a stream that has begun ends with."""
        if isinstance(error, GenerationError | EngineUnavailableError):
            said = self._engine_error(error)
        else:
            logger.error("reply %s broke off", reply_id, exc_info=error)
            said = internal_error()
        entry.broke_off(said)
        return reply.error(said)

    async def _collect(
        self,
        prepared: Prepared,
        choices: Sequence[ChoiceStream],
        reply: Reply,
        entry: OpenRequest,
        deadline: Deadline,
    ) -> JSON:
        parts: list[list[ChoiceDelta]] = [[] for _ in choices]
        async with aclosing(self._deltas(prepared, choices, entry, deadline)) as stream:
            async for delta in stream:
                parts[delta.index].append(delta)
        samples, n = prepared.body.samples, prepared.body.n or 1
        deltas = [merged(part) for part in parts]
        # What is said of a prompt came with its first choice.
        deltas = [replace(delta, prompt=deltas[i - i % samples].prompt) for i, delta in enumerate(deltas)]
        used = usage(prepared.prompt_tokens, choices, samples)
        whole = reply.whole(best(deltas, choices, samples, n), used)
        await prepared.settle()
        return whole

    async def _events(
        self,
        prepared: Prepared,
        choices: Sequence[ChoiceStream],
        reply: Reply,
        entry: OpenRequest,
        deadline: Deadline,
    ) -> AsyncGenerator[bytes, None]:
        """The server-sent events, one bytes object per delta."""
        begun, body = False, prepared.body
        async with aclosing(self._deltas(prepared, choices, entry, deadline)) as deltas:
            async for delta in deltas:
                if body.continuous_usage:
                    delta = replace(delta, used=usage(prepared.prompt_tokens, choices, body.samples))
                if delta.is_empty and begun:
                    continue
                long = choices[delta.index].is_long(delta)
                if events := await asyncio.to_thread(reply.events, delta) if long else reply.events(delta):
                    begun = True
                    yield events
        used = usage(prepared.prompt_tokens, choices, body.samples)
        end = reply.end(replace(used, timings=entry.watch.as_json()) if body.include_timings else used)
        await prepared.settle()
        yield end

    async def _deltas(
        self, prepared: Prepared, choices: Sequence[ChoiceStream], entry: OpenRequest, deadline: Deadline
    ) -> AsyncGenerator[ChoiceDelta, None]:
        """What the engine's deltas add to the choices, until every choice has finished. A choice that meets a stop
        string ends its engine stream."""
        watch = entry.watch
        watch.submitted()
        streams = DeltaStreams(self._engine, prepared.requests, deadline)
        try:
            open_choices = len(choices)
            while open_choices:
                index, delta = await streams.next()
                if prepared.meter is not None:
                    prepared.meter(len(delta.token_ids))
                if not watch.has_first and (delta.token_ids or delta.finish_reason):
                    watch.first(delta.queued_seconds)
                if choices[index].finish_reason is not None:
                    continue  # queued before its stream was closed
                choice = choices[index]
                if delta.course is not None:
                    entry.fared(index, delta.course)
                added = await asyncio.to_thread(choice.feed, delta) if choice.is_long(delta) else choice.feed(delta)
                if added.finish_reason is not None:
                    open_choices -= 1
                    self._entrance.lengths.ended(choice.completion_tokens)
                    await streams.close(index)
                yield added
        finally:
            await streams.aclose()
