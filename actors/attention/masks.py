"""Which tokens the constrained rows of a step may be: masks by the requests' grammars, computed in a thread of their
own while the model computes the step.

A row's mask depends on its request and on the output's tokens before it alone, with drafts too."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from torch import Tensor

from isotherm.actors.attention.grammar_state import GrammarState
from isotherm.cluster.background import spawn_thread
from isotherm.cluster.errors import named_line
from isotherm.cluster.messages.requests import Constraint
from isotherm.cluster.text.grammar_vocabulary import GrammarVocabulary, error_of
from isotherm.kernels.ops import Kernels

log = logging.getLogger(__name__)
MOST_THREADS = 8  # that compute the masks of one step
_ALL = 0xFFFFFFFF
_T = TypeVar("_T")


@dataclass(frozen=True)
class Ask:
    """A chunk whose rows are constrained: the one at `row`, and one more after each token of the draft."""

    row: int
    state: GrammarState
    tokens: Sequence[int]  # prompt and output; they stay as they are until the masks are there
    prompt_length: int
    stops: tuple[int, ...]  # tokens that end the text
    draft: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepMasks:
    """For the constrained ones among a step's rows of logits."""

    rows: tuple[int, ...]
    allowed: Tensor  # int32 [len(rows), words]: which tokens may be, as kernels/ops.py's `token_bits` reads it
    errors: dict[int, str]  # row → why nothing can follow there

    def apply(self, kernels: Kernels, logits_NV: Tensor) -> None:
        kernels.forbid(logits_NV, self.rows, self.allowed)


class Masks:
    """`load` gives the vocabulary, of the width of a row of logits, at the first constrained request."""

    def __init__(self, load: Callable[[], GrammarVocabulary]):
        self._load = load
        self._loading, self._one_step = threading.Lock(), threading.Lock()
        self._vocabulary: GrammarVocabulary | None = None
        self._executor: LLExecutor | None = None
        self._computing, self._compiling = _Worker("grammar masks"), _Worker("grammars")

    def keep_if_ready(self, constraint: Constraint) -> bool:
        """Whether the first mask of a request with it does not wait for its grammar to be compiled. What is there is
        kept for it."""
        if self._vocabulary is None or not self._vocabulary.is_ready(constraint.grammar):
            return False
        self._vocabulary.prepare(constraint, constraint.grammar)
        return True

    def compile(self, constraint: Constraint, then: Callable[[], None]) -> None:
        """Compile its grammar in another thread, keep it for this constraint, and call `then` there."""

        def work() -> None:
            try:
                self._loaded().prepare(constraint, constraint.grammar)
            except Exception:  # the request learns of it when its first mask is needed
                log.exception("a grammar could not be compiled")
            then()

        self._compiling.submit(work)

    def begin(self, asks: Callable[[], Sequence[Ask]]) -> Callable[[], StepMasks]:
        """Compute a step's masks in another thread, where it is also asked which they are. What is returned gives them;
        where that thread has not come to it yet, as on a busy machine, it is done on the spot."""

        def work() -> StepMasks:
            with self._one_step:
                return self._compute(asks())

        future = self._computing.submit(work)
        return lambda: work() if future.cancel() else future.result()

    def _loaded(self) -> GrammarVocabulary:
        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            return self._vocabulary

    def _compute(self, asks: Sequence[Ask]) -> StepMasks:
        vocabulary = self._loaded()
        if self._executor is None:
            self._executor = LLExecutor(min(MOST_THREADS, max(1, (os.cpu_count() or 1) // 2)))
        step = _Step(asks, vocabulary)
        matchers = [(matcher, at) for at, ask in step.firsts() if (matcher := step.advance(at, ask)) is not None]
        if matchers:  # all in one call, which takes Python's lock once: the step's own thread needs it too
            self._executor.unsafe_compute_mask_ptr(matchers, step.address, step.row_bytes, len(step.packed))
        step.check()
        for at, ask in step.firsts():
            step.follow_draft(at, ask)
        return step.finish()


class _Rule(Enum):
    """What holds for a row."""

    NOTHING = "nothing"  # it follows a draft that cannot be: what is drawn there is not taken
    THOUGHT = "thought"  # all but what would end the text, which is still to come
    GRAMMAR = "grammar"


class _Step:
    """A step's masks in the making: a slot for each constrained row."""

    def __init__(self, asks: Sequence[Ask], vocabulary: GrammarVocabulary):
        self._asks, self._vocabulary = asks, vocabulary
        self._rows = tuple(ask.row + i for ask in asks for i in range(1 + len(ask.draft)))
        self._rules = [_Rule.NOTHING] * len(self._rows)
        self._errors: dict[int, str] = {}
        self.packed = np.zeros((len(self._rows), -(-vocabulary.size // 32)), dtype=np.uint32)  # a bit for each token
        self.row_bytes: int = self.packed.strides[0]
        self.address: int = self.packed.ctypes.data

    def firsts(self) -> list[tuple[int, Ask]]:
        """Each chunk with the slot of its first row."""
        out, at = [], 0
        for ask in self._asks:
            out.append((at, ask))
            at += 1 + len(ask.draft)
        return out

    def advance(self, at: int, ask: Ask) -> LLMatcher | None:
        """Bring a state up to date; the matcher, where a mask is to be computed by it."""
        state = ask.state
        try:
            matcher = state.take(ask.tokens, ask.prompt_length, self._vocabulary)
        except Exception as error:  # it is this request's alone
            log.exception("a grammar's state could not be brought up to date")
            state.error, state.is_broken = named_line(error), True
        if state.error:
            return None
        self._rules[at] = _Rule.THOUGHT if state.thinks else _Rule.GRAMMAR
        return None if state.thinks else matcher

    def check(self) -> None:
        """Where the mask of a first row could not be computed, try once more with a new matcher, and then with one
        that nobody shares. A matcher that can no more allows the end alone."""
        for at, ask in self.firsts():
            state = ask.state
            if self._rules[at] is _Rule.GRAMMAR and self._allows(at, self._vocabulary.eos) and error_of(state.matcher):
                for alone in (False, True):
                    matcher = state.renew(self._vocabulary, alone)
                    if not state.error:
                        self.mask(at, matcher)
                        state.error = error_of(matcher)
                    if not state.error:
                        break
            if state.error:
                self._errors[at] = state.error

    def follow_draft(self, at: int, ask: Ask) -> None:
        """Masks after each token of a draft, as far as the tokens can be; the state stays as it was. They are taken by
        a copy: a matcher that is rolled back may give the last mask again where another is due."""
        state = ask.state
        if not ask.draft or state.error:
            return
        matcher, thinks = state.matcher.deep_copy(), state.thinks
        for i, token in enumerate(ask.draft):
            at += 1
            if token in ask.stops:
                break
            if thinks:
                thinks = not state.ends_thought(token)
            elif token == self._vocabulary.eos or not self._allows(at - 1, token):
                break
            elif not matcher.try_consume_tokens([token]):  # others that share it may have made it fail
                matcher = state.drafted(ask.draft[: i + 1], self._vocabulary)
            self._rules[at] = _Rule.THOUGHT if thinks else _Rule.GRAMMAR
            if not thinks:
                self.mask(at, matcher)
                if error_of(matcher):
                    matcher = state.drafted(ask.draft[: i + 1], self._vocabulary)
                    self.mask(at, matcher)
                if why := error_of(matcher):
                    self._errors[at] = why
                    break

    def _allows(self, at: int, token: int) -> bool:
        """Whether the mask of the row has the token."""
        word, bit = divmod(token, 32)
        return bool(self.packed[at, word] >> bit & 1)

    def mask(self, at: int, matcher: LLMatcher) -> None:
        matcher.unsafe_compute_mask_ptr(self.address + at * self.row_bytes, self.row_bytes)

    def finish(self) -> StepMasks:
        width, eos = self._vocabulary.width, self._vocabulary.eos
        may_end = (self.packed[:, eos // 32] >> eos % 32 & 1).tolist()
        self._clear_from(width)
        cut = width < self._vocabulary.size
        for first, ask in self.firsts():
            stops = [token for token in ask.stops if token < width]
            for at in range(first, first + 1 + len(ask.draft)):
                if at in self._errors:
                    self._errors[at] = ask.state.named(self._errors[at])
                    self.packed[at] = _ALL
                elif self._rules[at] is not _Rule.GRAMMAR:
                    self.packed[at] = _ALL
                    if self._rules[at] is _Rule.THOUGHT:
                        self._forbid(at, [token for token in stops if not ask.state.ends_thought(token)])
                else:
                    if may_end[at]:
                        self._forbid(at, [eos])  # the model may not have it
                        self._allow(at, stops)
                    if (cut or (may_end[at] and not stops)) and not self.packed[at].any():
                        why = "the text is complete, and the request has no token that ends it"
                        if not may_end[at] or ask.stops:
                            why = f"of what can follow the model, with {width} tokens, has nothing"
                        self._errors[at] = ask.state.named(why)
                        self.packed[at] = _ALL
        errors = {self._rows[at]: why for at, why in self._errors.items()}
        return StepMasks(self._rows, torch.from_numpy(self.packed.view(np.int32)), errors)

    def _allow(self, at: int, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.packed[at, token // 32] |= np.uint32(1 << token % 32)

    def _forbid(self, at: int, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.packed[at, token // 32] &= np.uint32(_ALL ^ 1 << token % 32)

    def _clear_from(self, width: int) -> None:
        """No bits stand for what the model does not have."""
        word, bit = divmod(width, 32)
        if word < self.packed.shape[1]:
            self.packed[:, word] &= np.uint32((1 << bit) - 1)
            self.packed[:, word + 1 :] = 0


class _Worker:
    """A thread that does one thing after the other, from the first one on."""

    def __init__(self, name: str):
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        if self._thread is None:
            self._thread = spawn_thread(self._name, self._run)
        future: Future[_T] = Future()
        self._queue.put((future, work))
        return future

    def _run(self) -> None:
        while True:
            self._do(*self._queue.get())  # nothing of it is held while the next one is waited for

    def _do(self, future: Future[Any], work: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
