"""From token ids to text, as they come: whole characters only, and stop strings over token borders."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextPiece:
    """What a push brought: text that is final, how many of the pushed tokens count, and whether a stop string was
    completed by the last of them."""

    text: str
    tokens: int
    stopped: bool = False


class TextStream:
    """Token ids in, text out, in time linear in the text. Text comes out when it can't change any more: never half a
    UTF-8 character, and never a tail that may turn out to begin a stop string. The stop string itself is not part of
    the text, unless `include_stop`.

    A token may be hidden: left out of the text, as special tokens are. Stop strings that have the text of a special
    token in them (`spelled`) see it all the same; to the others it is not there.

    Works on bytes, not on decoded windows: for these tokenizers a token is a fixed byte string, so decoding is a
    prefix-stable UTF-8 decoder over their concatenation (the same result as decoding all ids at once; a test compares
    them)."""

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        stop: Sequence[str] = (),
        least_tokens: int = 0,
        *,
        include_stop: bool = False,
        spelled: Sequence[str] = (),
        hidden_text: Callable[[int], str] = lambda token_id: "",
    ) -> None:
        """`least_tokens`: stop strings are looked for in the text of what comes after so many tokens. `hidden_text`:
        that of a token whose `token_bytes` are left out, asked first; empty for any other."""
        if any(not text for text in stop):
            raise ValueError("a stop string must not be empty")
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [_StopMatcher(text) for text in stop]
        self._spelled = [matcher for matcher in self._stops if matcher.text in spelled]
        self._include_stop = include_stop
        self._hidden_text = hidden_text
        self._held = ""
        self.stopped_by: str | None = None  # the stop string that was completed
        self._free = least_tokens  # tokens in which no stop string counts

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed."""
        return self.stopped_by is not None

    def push(self, token_ids: Sequence[int]) -> TextPiece:
        """Takes further tokens. After a stop string nothing more may be pushed."""
        if self.stopped:
            raise ValueError("pushed tokens after a stop string")
        if not self._stops:
            data = b"".join(map(self._token_bytes, token_ids))
            return TextPiece(self._utf8.decode(data), len(token_ids))
        out: list[str] = []
        for count, token_id in enumerate(token_ids, 1):
            hidden = self._hidden_text(token_id) if self._spelled else ""
            text = hidden or self._utf8.decode(self._token_bytes(token_id))
            if not self._free:
                out.append(self._match(text, shown=not hidden))
            elif not hidden:
                out.append(text)
            self._free = max(0, self._free - 1)
            if self.stopped:
                return TextPiece("".join(out), count, stopped=True)
        return TextPiece("".join(out), len(token_ids))

    def flush(self) -> str:
        """The end of the stream: what was held back (an unfinished character as U+FFFD)."""
        if self.stopped:
            return ""
        text = self._match(self._utf8.decode(b"", final=True))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _match(self, text: str, shown: bool = True) -> str:
        """The part of the held-back and new text that is now final. The stop string that is complete first counts; of
        two at once, the longer."""
        held, end = self._held + (text if shown else ""), len(self._held)
        for char in text:
            end += shown
            complete = [stop for stop in (self._stops if shown else self._spelled) if stop.step(char, shown)]
            if complete:
                matched = max(complete, key=lambda stop: (stop.shown, len(stop.text)))
                self.stopped_by, self._held = matched.text, ""
                return held[: end if self._include_stop else end - matched.shown]
        keep = max((stop.shown for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


class _StopMatcher:
    """Knuth–Morris–Pratt over a stream of characters: `state` is the length of the longest prefix of `text` that ends
    the stream so far, `shown` how many characters of it are not hidden."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.state = 0
        self._hidden: deque[int] = deque()  # where in the stream the hidden characters among the last `state` are
        self._at = 0
        self._fallback = [0] * len(text)  # [i]: longest proper prefix of text[: i + 1] that is also its suffix
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._fallback[length - 1]
            length += text[i] == text[length]
            self._fallback[i] = length

    @property
    def shown(self) -> int:
        return self.state - len(self._hidden)

    def step(self, char: str, shown: bool = True) -> bool:
        """Takes one character. True when it completes the stop string; the matcher is then spent."""
        state = self.state
        while state and char != self.text[state]:
            state = self._fallback[state - 1]
        self.state = state + (char == self.text[state])
        if not shown:
            self._hidden.append(self._at)
        self._at += 1
        while self._hidden and self._hidden[0] < self._at - self.state:
            self._hidden.popleft()
        return self.state == len(self.text)
