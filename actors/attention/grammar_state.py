"""Where the output of one request stands in its grammar, made from the output's tokens alone: so it is the same after a
move, a preemption or a death."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher

from isotherm.cluster.messages.requests import Constraint
from isotherm.cluster.text.grammar_vocabulary import Compiled, GrammarVocabulary, error_of

# A matcher may make so many of its lexer's states between one mask and the next. Where a stream had a mask before each
# token, the same tokens in one go may be too much.
_MOST_BETWEEN_MASKS = 16


class GrammarState:
    def __init__(self, constraint: Constraint):
        self._constraint = constraint
        self._grammar, self._after = constraint.grammar, frozenset(constraint.after)
        self.thinks = bool(constraint.after)  # the grammar does not hold yet
        self.error = ""  # why nothing can follow
        self.is_broken = False  # the error is none of the request's
        self._compiled: Compiled | None = None  # what the matcher is a copy of
        self._matcher: LLMatcher | None = None
        self._output: list[int] = []  # as far as it was taken

    def take(self, tokens: Sequence[int], prompt_length: int, vocabulary: GrammarVocabulary) -> LLMatcher:
        """The matcher after all the output in `tokens`, of which it may have had a part already."""
        new = tokens[prompt_length + len(self._output) :]
        self._output += new
        if self._matcher is None:
            self._begin(vocabulary.prepared(self._constraint) or vocabulary.compiled(self._grammar))
        if not self.error and (text := self._text(new)):
            if self._compiled is not None:
                vocabulary.count(self._grammar, self._compiled, len(text))
            if not _consume(self.matcher, text, _MOST_BETWEEN_MASKS):
                self.renew(vocabulary)
                if self.error:
                    self.renew(vocabulary, alone=True)
        return self.matcher

    def _begin(self, compiled: Compiled) -> None:
        self._compiled, self._matcher = compiled, compiled.copy()
        self.error = error_of(self._matcher)

    @property
    def param(self) -> str:
        """The request's field that is the cause of an error; empty where it is not the request's own."""
        return "" if self.is_broken else self._constraint.param

    @property
    def matcher(self) -> LLMatcher:
        """Once something was taken."""
        assert self._matcher is not None
        return self._matcher

    def renew(self, vocabulary: GrammarVocabulary, alone: bool = False) -> LLMatcher:
        """Begin anew with all of the output: what others took of the same grammar counts towards a matcher's limits.
        All whose matcher failed share a new one, so that it is compiled once; `alone`: in one that nobody shares."""
        if alone:
            self._compiled, self._matcher = None, vocabulary.fresh_matcher(self._grammar)
        else:
            self._begin(vocabulary.compiled(self._grammar, self._compiled))
        self.thinks = bool(self._after)
        _consume(self.matcher, self._text(self._output), 1)
        self.error = error_of(self.matcher)
        return self.matcher

    def drafted(self, draft: Sequence[int], vocabulary: GrammarVocabulary) -> LLMatcher:
        """One that nobody shares, after the output and these tokens, which may be wrong; the state stays as it is."""
        matcher = vocabulary.fresh_matcher(self._grammar)
        _consume(matcher, self._held([*self._output, *draft], bool(self._after))[0], 1)
        return matcher

    def ends_thought(self, token: int) -> bool:
        return token in self._after

    def _text(self, tokens: Sequence[int]) -> list[int]:
        """Those that the grammar is about."""
        text, self.thinks = self._held(tokens, self.thinks)
        return text

    def _held(self, tokens: Sequence[int], thinks: bool) -> tuple[list[int], bool]:
        """Those that the grammar is about, and whether it is still a thought after them."""
        if not thinks:
            return list(tokens), False
        for i, token in enumerate(tokens):
            if token in self._after:
                return list(tokens[i + 1 :]), False
        return [], True

    def named(self, why: str) -> str:
        """Why nothing can follow, with the field that asks for it, or else the grammar by its beginning."""
        if self.param:
            return f"{self.param}: no token can come after {len(self._output)} tokens of output: {why}"
        grammar = self._grammar if len(self._grammar) <= 80 else f"{self._grammar[:79]}…"
        return f"no token can follow by the grammar {grammar!r} after {len(self._output)} tokens: {why}"


def _consume(matcher: LLMatcher, tokens: Sequence[int], between_masks: int) -> bool:
    """Whether all the tokens can be."""
    for i, token in enumerate(tokens):
        if i and i % between_masks == 0:
            matcher.compute_bitmask()
        if not matcher.consume_token(token):
            return False
    return True
