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
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from isotherm.cluster.text.json_schema import GrammarError, SlowGrammarError

MOST_SECONDS = 1.0  # of computing time that compiling a grammar may take
VERDICTS, MATCHERS = 4096, 64  # how many are kept
MOST_TAKEN = 1 << 16  # tokens by the copies of one matcher; what they make of its lexer can be some 200 MB
STACK_BYTES = 256 << 20  # of address space; only what is used of it is memory
_STACK_SIZE = threading.Lock()
_LIMITS = LLParserLimits(verbose_errors=False)
_EXCERPT = re.compile(r"\d+ \| ")  # of the grammar, below a message about it
_ONE_OF = "a 'oneOf' of which two options may hold is not supported; 'anyOf' is"
_NOTHING = "nothing can match it: it has no text, or none that ever ends"
_NOTHING_BY_REF = "nothing can match it: what its $ref names leads to itself, and never ends"
_SLOW = "compiling it takes"
_TOO_MANY = "it never ends, or allows too much at once"
# llguidance's own words for these, and what is no matter of its users.
_SAID = (
    ("NoExtension", _NOTHING),
    ("oneOf constraints are not supported", _ONE_OF),
    ("parser error: Too many", _TOO_MANY),
)
_INTERNAL = re.compile(r"\s*<non-verbose/>|json-schema:///")
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

    def drop(self, text: str, value: _V) -> None:
        """If it is that one which is there."""
        key = _key(text)
        with self._lock:
            if self._values.get(key) is value:
                del self._values[key]


class Compiled:
    """A matcher at the beginning of its grammar. All its copies share its lexer: its states, its limits and its
    failure."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher
        self.taken = 0  # tokens, by all the copies

    def copy(self) -> LLMatcher:
        return self._matcher.deep_copy()


class GrammarVocabulary:
    """`eos`: the token by which matchers say that the text may end. `size`: how many tokens model or tokenizer know; no
    grammar allows those that the tokenizer does not. `width`: how many the model can give, where the tokenizer has
    more."""

    def __init__(self, tokenizer_json: Callable[[], str], eos: int, size: int, width: int | None = None):
        self.eos, self.size, self.width = eos, size, size if width is None else width
        self._tokenizer_json = tokenizer_json
        self._loading = threading.Lock()
        self._loaded: LLTokenizer | None = None
        self._verdicts: _Lately[str] = _Lately(VERDICTS)
        self._matchers: _Lately[Compiled] = _Lately(MATCHERS)
        self._prepared: dict[int, Compiled] = {}  # by the id of what it was prepared for

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
            raise (SlowGrammarError if why.startswith(_SLOW) else GrammarError)(why)

    def _verdict(self, grammar: str) -> str:
        """Empty where there is nothing against it."""
        tokenizer = self._tokenizer()

        def compiled() -> tuple[LLMatcher, float]:
            begin = time.thread_time()
            matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
            if not matcher.is_error() and (token := _first(matcher.compute_bitmask(), self.eos)) is not None:
                matcher.try_consume_tokens([token])  # what a lexer has to be for a long repetition shows only here
                matcher.compute_bitmask()
            return matcher, time.thread_time() - begin

        matcher, seconds = _with_deep_stack(compiled)
        if why := error_of(matcher):
            return _NOTHING_BY_REF if why == _NOTHING and '"$ref"' in grammar else why
        if seconds > MOST_SECONDS:
            return f"{_SLOW} {seconds:.1f} s; at most {MOST_SECONDS:g} s are allowed"
        return ""

    def is_ready(self, grammar: str) -> bool:
        """Whether `compiled` answers at once."""
        return self._matchers.get(grammar) is not None

    def prepare(self, owner: object, grammar: str) -> None:
        """Compile it, and keep it as long as its owner is there, whatever others need meanwhile."""
        if id(owner) not in self._prepared:
            weakref.finalize(owner, self._prepared.pop, id(owner), None).atexit = False
        self._prepared[id(owner)] = self.compiled(grammar)

    def prepared(self, owner: object) -> Compiled | None:
        return self._prepared.get(id(owner))

    def compiled(self, grammar: str, instead_of: Compiled | None = None) -> Compiled:
        """A matcher at the beginning of the grammar, to be copied; where it cannot be compiled one with an error.
        `instead_of`: one of which a copy failed."""
        found = self._matchers.get(grammar)
        if found is None or found is instead_of:
            with self._matchers.making:
                found = self._matchers.get(grammar)
                if found is None or found is instead_of:
                    found = Compiled(self.fresh_matcher(grammar))
                    self._matchers.put(grammar, found)
        return found

    def count(self, grammar: str, compiled: Compiled, tokens: int) -> None:
        """A copy took so many tokens: at some time all that they made of the lexer is let go."""
        compiled.taken += tokens
        if compiled.taken > MOST_TAKEN:
            self._matchers.drop(grammar, compiled)

    def fresh_matcher(self, grammar: str) -> LLMatcher:
        """As a copy of `compiled`, made anew: it shares nothing with others."""
        tokenizer = self._tokenizer()
        return _with_deep_stack(lambda: LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS))

    def _tokenizer(self) -> LLTokenizer:
        with self._loading:
            if self._loaded is None:
                self._loaded = LLTokenizer(_guarded(self._tokenizer_json()), n_vocab=self.size, eos_token=self.eos)
            return self._loaded


def _with_deep_stack(work: Callable[[], _V]) -> _V:
    """Run the compiler in a thread of its own: it calls itself for each rule and schema within another, and some
    thousands of them would end the process on a thread's usual stack (seen in llguidance 1.9.1). What it raises is
    raised here."""
    done: Future[_V] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    with _STACK_SIZE:
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="grammar compiler", daemon=True)
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    return done.result()


def _first(mask: bytes, eos: int) -> int | None:
    """The first token that a mask allows, but for the one that ends the text."""
    for at, byte in enumerate(mask):
        for bit in range(8) if byte else ():
            if byte >> bit & 1 and 8 * at + bit != eos:
                return 8 * at + bit
    return None


def error_of(matcher: LLMatcher) -> str:
    """Why a matcher cannot go on, in one line; empty where it can, or where the text is complete."""
    if matcher.is_error():
        lines = [line.strip() for line in matcher.get_error().splitlines()]
        said = " ".join(line for line in lines if line.strip("^") and not _EXCERPT.match(line))
        said = _INTERNAL.sub("", said)[:400]
        return next((ours for theirs, ours in _SAID if said.startswith(theirs)), said)
    if matcher.is_stopped() and matcher.stop_reason() not in ("NoExtension", "EndOfSentence"):
        return f"nothing can follow ({matcher.stop_reason()})"
    return ""


def _guarded(tokenizer_json: str) -> str:
    """The tokenizer with its added tokens under names that no text has: grammars name them by their ids. Under their
    own llguidance would make such a token of a constant in which its text stands, and then find that it does not
    fit."""
    tokenizer = json.loads(tokenizer_json)
    tokenizer["post_processor"] = None
    renamed: dict[str, str] = {}
    for token in tokenizer.get("added_tokens", ()):
        name = renamed[token["content"]] = f"\ufdd0{token['id']}\ufdd1"
        token |= {"content": name, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    model = tokenizer["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(name, name): id_ for name, id_ in model["vocab"].items()}
    else:  # of a unigram model: pairs of a piece and its score
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    return json.dumps(tokenizer)


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
