"""Grammars compiled for one tokenizer: whether one can be had at all, and matchers that say token by token what may
come next. Thread-safe.

Compiling cannot be interrupted, so what it may cost is bounded before: by the text's size (cluster/text/grammar.py) and
by LIMITS; what took too long all the same is refused from then on."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from isotherm.cluster.text.json_schema import GrammarError

MOST_SECONDS = 1.0  # of computing time that compiling a grammar may take
VERDICTS, MATCHERS = 4096, 64  # how many are kept
_LIMITS = LLParserLimits(verbose_errors=False)
_EXCERPT = re.compile(r"\d+ \| ")  # of the grammar, below a message about it
_ONE_OF = "a 'oneOf' of which two options may hold is not supported; 'anyOf' is"
_V = TypeVar("_V")


class _Lately(Generic[_V]):
    """The values that were used last, by a text. Each is made once, one at a time, while those that are there can be
    had."""

    def __init__(self, most: int):
        self._most = most
        self._values: OrderedDict[bytes, _V] = OrderedDict()
        self._lock = threading.Lock()
        self.making = threading.Lock()

    def get(self, text: str) -> _V | None:
        key = _key(text)
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, text: str, value: _V) -> None:
        with self._lock:
            self._values[_key(text)] = value
            if len(self._values) > self._most:
                self._values.popitem(last=False)


class GrammarVocabulary:
    """`eos`: the token by which matchers say that the text may end. `size`: how many tokens the model knows; no grammar
    allows those that the tokenizer does not."""

    def __init__(self, tokenizer_json: Callable[[], str], eos: int, size: int):
        self.eos, self.size = eos, size
        self._tokenizer_json = tokenizer_json
        self._loading = threading.Lock()
        self._loaded: LLTokenizer | None = None
        self._verdicts: _Lately[str] = _Lately(VERDICTS)
        self._matchers: _Lately[LLMatcher] = _Lately(MATCHERS)

    def check(self, grammar: str) -> None:
        """Raises GrammarError where it cannot be compiled, takes too long, or allows nothing at all."""
        why = self._verdicts.get(grammar)
        if why is None:
            with self._verdicts.making:
                why = self._verdicts.get(grammar)
                if why is None:
                    why = self._verdict(grammar)
                    self._verdicts.put(grammar, why)
        if why:
            raise GrammarError(why)

    def _verdict(self, grammar: str) -> str:
        """Empty where there is nothing against it."""
        tokenizer = self._tokenizer()
        begin = time.thread_time()
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()
        seconds = time.thread_time() - begin
        if why := error_of(matcher):
            return why
        if seconds > MOST_SECONDS:
            return f"compiling it takes {seconds:.1f} s; at most {MOST_SECONDS:g} s are allowed"
        return ""

    def is_ready(self, grammar: str) -> bool:
        """Whether `matcher` answers at once."""
        return self._matchers.get(grammar) is not None

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of the grammar; where it cannot be compiled one with an error."""
        found = self._matchers.get(grammar)
        if found is None:
            with self._matchers.making:
                found = self._matchers.get(grammar)
                if found is None:
                    found = self.fresh_matcher(grammar)
                    self._matchers.put(grammar, found)
        return found.deep_copy()

    def fresh_matcher(self, grammar: str) -> LLMatcher:
        """As `matcher`, compiled anew: it shares nothing with others."""
        return LLMatcher(self._tokenizer(), grammar, log_level=0, limits=_LIMITS)

    def _tokenizer(self) -> LLTokenizer:
        with self._loading:
            if self._loaded is None:
                self._loaded = LLTokenizer(_guarded(self._tokenizer_json()), n_vocab=self.size, eos_token=self.eos)
            return self._loaded


def error_of(matcher: LLMatcher) -> str:
    """Why a matcher cannot go on, in one line; empty where it can, or where the text is complete."""
    if matcher.is_error():
        lines = [line.strip() for line in matcher.get_error().splitlines()]
        said = " ".join(line for line in lines if line.strip("^") and not _EXCERPT.match(line))[:400]
        return _ONE_OF if said.startswith("oneOf constraints are not supported") else said
    if matcher.is_stopped() and matcher.stop_reason() not in ("NoExtension", "EndOfSentence"):
        return f"nothing can follow ({matcher.stop_reason()})"
    return ""


def _guarded(tokenizer_json: str) -> str:
    """The tokenizer with every control token marked as special, also those that its file does not mark (DeepSeek's
    `<think>` and those of tool calls): no grammar's text is ever made of them unless it names them."""
    tokenizer = json.loads(tokenizer_json)
    for token in tokenizer.get("added_tokens", ()):
        token["special"] = token["special"] or is_control(token["content"])
    return json.dumps(tokenizer)


def is_control(token: str) -> bool:
    """Whether an added token looks like a control token."""
    return token.startswith("<") and token.endswith(">")


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
