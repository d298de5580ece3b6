"""From token ids to text, as they come: whole characters only, and stop strings over token borders."""

from __future__ import annotations

import codecs
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
    the text.

    Works on bytes, not on decoded windows: for these tokenizers a token is a fixed byte string, so decoding is a
    prefix-stable UTF-8 decoder over their concatenation (the same result as decoding all ids at once; a test compares
    them)."""

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = (), least_tokens: int = 0) -> None:
        """`least_tokens`: stop strings are looked for in the text of what comes after so many tokens."""
        if any(not text for text in stop):
            raise ValueError("a stop string must not be empty")
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [_StopMatcher(text) for text in stop]
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
            text = self._utf8.decode(self._token_bytes(token_id))
            out.append(text if self._free else self._match(text))
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

    def _match(self, text: str) -> str:
        """The part of the held-back and new text that is now final. The stop string that is complete first counts; of
        two at once, the longer."""
        held = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            matched = max([stop.text for stop in self._stops if stop.step(char)], key=len, default=None)
            if matched is not None:
                self.stopped_by, self._held = matched, ""
                return held[: end - len(matched)]
        keep = max((stop.state for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


class _StopMatcher:
    """Knuth–Morris–Pratt over a stream of characters: `state` is the length of the longest prefix of `text` that ends
    the stream so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.state = 0
        self._fallback = [0] * len(text)  # [i]: longest proper prefix of text[: i + 1] that is also its suffix
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._fallback[length - 1]
            length += text[i] == text[length]
            self._fallback[i] = length

    def step(self, char: str) -> bool:
        """Takes one character. True when it completes the stop string; the matcher is then spent."""
        state = self.state
        while state and char != self.text[state]:
            state = self._fallback[state - 1]
        self.state = state + (char == self.text[state])
        return self.state == len(self.text)
