"""The requests for tokens that one ingress replica has open, and those that ended lately: where each one's time went,
never what was said in it. Bounded in memory."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from random import random
from types import TracebackType
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.routing import Match, Route

from isotherm.cluster.api.access.caller import caller_of, known_of
from isotherm.cluster.api.behalf import in_process_priority
from isotherm.cluster.api.choices import ChoiceStream
from isotherm.cluster.api.errors import ReplyError, internal_error
from isotherm.cluster.api.prepare import Prepared
from isotherm.cluster.api.timing import Stopwatch
from isotherm.cluster.api.trace_context import HEADER, STATE, TraceContext, begin
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.figures import OTHER
from isotherm.cluster.messages.requests import Course

logger = logging.getLogger(__name__)
_NO_COURSE = Course()
REMEMBERED = 200  # requests that have ended
CLIENT_CLOSED = 499  # the status of a request whose client went away, as proxies write it
_LATER = (429, 503)  # statuses after which a batch asks its row again


@dataclass(frozen=True)
class RequestRecord:
    """One request at one moment. Times are in seconds. `state`: "preparing" (its body is read and made into tokens),
    "waiting" (for its first token), "generating", "ended". `status` is HTTP's, 0 while nothing was answered, and 499
    where the client went away; a stream that breaks off has status 200 and an `error`. `queue` and `prefill` are told
    apart when the first token comes: until then all of the wait counts as queue."""

    id: str  # X-Request-Id
    reply: str  # id of the reply; empty while there is none
    key: str  # name of the API key; empty where the server has none
    route: str  # as the application writes it
    model: str
    state: str
    status: int
    error: str  # kind of it: the code of the error that the client was told; empty: none
    stream: bool
    choices: int
    prompt_tokens: int
    cached_tokens: int  # of these
    output_tokens: int
    finish_reasons: tuple[str, ...]  # of the choices that have finished
    started: float  # since the epoch
    prepare: float
    queue: float
    prefill: float
    decode: float
    first_token: float | None  # from its arrival
    seconds: float  # from its arrival to its end, or to now
    moved: int = 0  # times that a shard gave one of its streams to another
    resumed: int = 0  # times that one went on elsewhere after its shard was lost
    preempted: int = 0  # times that one gave up its place and was recomputed
    group_wait: float = 0.0  # for which shards waited for expert groups while they had it; of several choices the sum
    chunks: tuple[tuple[float, int], ...] = ()  # parts of the prompt: the end of each, from its arrival, and its tokens
    moves: tuple[tuple[float, str], ...] = ()  # when it went on elsewhere, from its arrival, "moved" or "resumed"
    trace: TraceContext | None = None  # of its own span, where traces are made

    @property
    def is_open(self) -> bool:
        return self.state != "ended"

    def as_json(self) -> JSON:
        """With times to the tenth of a millisecond."""
        found = {name: _rounded(value) for name, value in vars(self).items()}
        return found | {"trace": "" if self.trace is None else self.trace.trace}


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


Sink = Callable[[RequestRecord], None]


class OpenRequest:
    """A request from its arrival to its end, as a context manager: what gets out of it is its error. One that is
    answered as a stream is left when the stream is."""

    def __init__(
        self,
        request_id: str,
        key: str,
        route: str,
        ended: Callable[[OpenRequest], None],
        clock: Callable[[], float],
        waits: bool,
    ) -> None:
        self.watch = Stopwatch(clock)
        self._waits = waits
        self.request_id, self._key, self._route, self._ended = request_id, key, route, ended
        self._started = time.time()
        self._prepared: Prepared | None = None
        self._choices: Sequence[ChoiceStream] = ()
        self._courses: dict[int, Course] = {}  # by choice
        self._moves: list[tuple[float, str]] = []
        self.trace: TraceContext | None = None
        self._status, self._error = 0, ""
        self._has_ended = False

    def prepared(self, prepared: Prepared, choices: Sequence[ChoiceStream]) -> None:
        """What was asked for is known; `choices` count its tokens from now on."""
        self._prepared, self._choices = prepared, choices

    def fared(self, choice: int, course: Course) -> None:
        """What an engine says of a choice's course so far."""
        before, now = self._courses.get(choice, _NO_COURSE), self.watch.elapsed()
        for word, more in ("moved", course.moved - before.moved), ("resumed", course.resumed - before.resumed):
            self._moves += [(now, word)] * max(0, more)
        self._courses[choice] = course

    def failed(self, error: BaseException) -> None:
        """It ends with this, though its reply may have begun; the first one counts."""
        if self._error:
            return
        if isinstance(error, ReplyError):
            self._status, self._error = error.status, error.code or error.kind
        elif isinstance(error, ClientDisconnect | asyncio.CancelledError):
            self._status, self._error = CLIENT_CLOSED, "client_closed"
        else:
            said = internal_error()
            self._status, self._error = said.status, said.code or said.kind

    def broke_off(self, error: ReplyError) -> None:
        """Its stream ends with this, after a status that said that all is well."""
        self.failed(error)
        self._status = 200

    def __enter__(self) -> OpenRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is not None:
            self.failed(error)
        elif not self._error and not all(choice.finish_reason for choice in self._choices):
            self._status, self._error = CLIENT_CLOSED, "client_closed"  # its stream was left early
        self._status = self._status or 200
        self._has_ended = True
        self._ended(self)

    @property
    def goes_on_waiting(self) -> bool:
        """Whether this end was none: nothing was generated, and it will be asked again."""
        return self._waits and self._status in _LATER and not self.watch.has_first

    def record(self) -> RequestRecord:
        """As it is now."""
        prepared, choices, watch = self._prepared, self._choices, self.watch
        phases = watch.phases()
        if not watch.has_first:  # nothing has come: the decode that the watch shows is what it has come to
            phases |= {"queue" if watch.has_submitted else "prepare": phases["decode"], "decode": 0.0}
        state = "generating" if watch.has_first else "waiting" if watch.has_submitted else "preparing"
        until_first = phases["prepare"] + phases["queue"] + phases["prefill"]
        return RequestRecord(
            id=self.request_id,
            reply="" if prepared is None else prepared.id,
            key=self._key,
            route=self._route,
            model="" if prepared is None else prepared.body.model,
            state="ended" if self._has_ended else state,
            status=self._status,
            error=self._error,
            stream=prepared is not None and bool(prepared.body.stream),
            choices=len(choices),
            prompt_tokens=0 if prepared is None else prepared.prompt_tokens,
            cached_tokens=0 if prepared is None else sum(c.cached_tokens for c in choices[:: prepared.body.samples]),
            output_tokens=sum(choice.completion_tokens for choice in choices),
            finish_reasons=tuple(c.finish_reason for c in choices if c.finish_reason is not None),
            started=self._started,
            prepare=phases["prepare"],
            queue=phases["queue"],
            prefill=phases["prefill"],
            decode=phases["decode"],
            first_token=until_first if watch.has_first else None,
            seconds=phases["total"],
            moved=sum(course.moved for course in self._courses.values()),
            resumed=sum(course.resumed for course in self._courses.values()),
            preempted=sum(course.preemptions for course in self._courses.values()),
            group_wait=sum((course.group_wait for course in self._courses.values()), 0.0),
            chunks=tuple((phases["prepare"] + at, count) for at, count in self._courses.get(0, _NO_COURSE).chunks),
            moves=tuple(self._moves),
            trace=self.trace,
        )


class RequestBook:
    """One for each ingress replica. Every request that ends is told to the `sinks`: a log, metrics, traces. A batch's
    row that finds no room is none: it waits, and asks again for hours, where a refused client would be told."""

    def __init__(self, sinks: Sequence[Sink] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._sinks = list(sinks)
        self._clock = clock
        self._open: dict[int, OpenRequest] = {}
        self._recent: deque[RequestRecord] = deque(maxlen=REMEMBERED)
        self._sample: float | None = None

    def trace(self, sample: float) -> None:
        """From now on every request has a place in a trace; of those that bring none the share `sample` is recorded."""
        self._sample = sample

    def tell(self, sink: Sink) -> None:
        """One more sink, of requests that end from now on."""
        self._sinks.append(sink)

    def open(self, request: Request) -> OpenRequest:
        """A request for tokens has come, by a route whose path is its name; to be entered as a context."""
        return self._open_as(request, request.scope["path"])

    def _open_as(self, request: Request, route: str) -> OpenRequest:
        request_id = known_of(request, "request_id", "")
        waits = in_process_priority(request) is not None
        opened = OpenRequest(request_id, caller_of(request).name, route, self._end, self._clock, waits)
        if self._sample is not None:
            headers = request.headers
            opened.trace = begin(headers.get(HEADER), headers.get(STATE), self._sample, random)
            request.state.traceparent = opened.trace.header
        self._open[id(opened)] = opened
        return opened

    def refuse(self, request: Request, error: ReplyError) -> None:
        """A request for tokens has come and was refused before anything was read of it."""
        with suppress(ReplyError), self._open_as(request, _route_of(request)):
            raise error

    @property
    def open_count(self) -> int:
        return len(self._open)

    def running(self) -> list[RequestRecord]:
        """Those that are open, the oldest first."""
        return [opened.record() for opened in self._open.values()]

    def recent(self, most: int = REMEMBERED) -> list[RequestRecord]:
        """Those that ended last, the newest first."""
        return list(islice(reversed(self._recent), most))

    def _end(self, ended: OpenRequest) -> None:
        self._open.pop(id(ended), None)
        if ended.goes_on_waiting:
            return
        record = ended.record()
        self._recent.append(record)
        for sink in self._sinks:
            try:
                sink(record)
            except Exception:
                logger.exception("a request's end could not be told")


def _route_of(request: Request) -> str:
    """The route that would answer, as the application writes it; one word for all that nobody would: a path is whatever
    its client makes up, and must not become the name of a series."""
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is Match.FULL:
            return route.path
    return OTHER
