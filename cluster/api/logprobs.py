"""Log-probabilities as replies say them: a choice's tokens in OpenAI's two forms, a prompt's in that of OpenAI's
completions and in vLLM's."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.requests import PromptLogprobs, TokenLogprobs
from isotherm.cluster.text.tokenizer import Tokenizer

_LOWEST_LOGPROB = -9999.0  # what OpenAI gives for minus infinity, which JSON can't say
_LARGE = 4096  # log-probabilities: what is said of so many takes an event loop's time
_COMPLETION_KEYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class TextOffsets:
    """Where in a text its tokens begin, in characters."""

    def __init__(self, start: int = 0) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = start

    def take(self, data: bytes) -> int:
        """Where the next token begins, whose bytes in the text are these."""
        begin = self._at
        self._at += len(self._utf8.decode(data))
        return begin


def chat_entries(tokenizer: Tokenizer, pairs: Iterable[tuple[int, TokenLogprobs]]) -> JSON:
    """A list of objects."""
    return {
        "content": [
            {
                **_named(tokenizer, token, logprob.chosen),
                "top_logprobs": [_named(tokenizer, id_, value) for id_, value in logprob.top],
            }
            for token, logprob in pairs
        ],
        "refusal": None,
    }


def completion_entries(
    tokenizer: Tokenizer, triples: Iterable[tuple[int, TokenLogprobs | None, int]], top: int | None = None
) -> JSON:
    """An object of lists, from tokens, their log-probabilities (None: there are none) and their offsets; `top`: how
    many of the likeliest, where not all. The token itself is among them in any case, as OpenAI has it."""
    out: JSON = {key: [] for key in _COMPLETION_KEYS}
    for token, logprob, offset in triples:
        out["tokens"].append(token_text(tokenizer, token))
        out["token_logprobs"].append(None if logprob is None else finite(logprob.chosen))
        names: dict[str, float] = {}
        for id_, value in () if logprob is None else (*logprob.top[:top], (token, logprob.chosen)):
            # Most likely first: of two tokens with one text, the likelier counts.
            names.setdefault(token_text(tokenizer, id_), finite(value))
        out["top_logprobs"].append(None if logprob is None else names)
        out["text_offset"].append(offset)
    return out


def joined_entries(parts: Iterable[JSON | None]) -> JSON | None:
    """Those of consecutive tokens, all of one form, as one. ("refusal" is null in every part; the other keys hold
    lists.)"""
    there = [part for part in parts if part is not None]
    if len(there) < 2:
        return there[0] if there else None
    return {
        key: None if value is None else [entry for part in there for entry in part[key]]
        for key, value in there[0].items()
    }


@dataclass(frozen=True)
class PromptReport:
    """What a reply says of its prompt's tokens."""

    entries: JSON | None = None  # in the form of OpenAI's completions, where they are echoed
    by_token: tuple[JSON | None, ...] | None = None  # vLLM's prompt_logprobs


class PromptScores:
    """Log-probabilities of one prompt's tokens, as they come."""

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: Tokenizer,
        *,
        echo: str | None = None,
        echo_top: int = 0,
        top: int | None = None,
    ) -> None:
        """`echo`: the prompt as the reply shows it, where its tokens' log-probabilities are to stand beside those of
        the output, with the `echo_top` likeliest; `top`: how many of the likeliest vLLM's form has, None where it is
        not asked for."""
        self._prompt, self._tokenizer = prompt, tokenizer
        self._echo, self._echo_top, self._top = echo, echo_top, top
        self._scores: list[TokenLogprobs | None] = [None]

    @property
    def is_large(self) -> bool:
        """Whether the report is to be made, and written, in a thread."""
        return len(self._prompt) * (1 + max(self._echo_top, self._top or 0)) >= _LARGE

    def take(self, part: PromptLogprobs) -> None:
        if (skip := len(self._scores) - part.start) < 0:
            raise RuntimeError(f"prompt token {part.start} is scored before {len(self._scores)}")
        self._scores += part.tokens[skip:]

    def report(self) -> PromptReport | None:
        """As soon as all are there."""
        if len(self._scores) < len(self._prompt):
            return None
        return PromptReport(
            None if self._echo is None else self._entries(self._echo),
            None if self._top is None else tuple(map(self._by_token, self._prompt, self._scores)),
        )

    def _entries(self, echo: str) -> JSON:
        offsets = TextOffsets()
        at = 0
        triples: list[tuple[int, TokenLogprobs | None, int]] = []
        for token, score in zip(self._prompt, self._scores, strict=True):
            data = self._tokenizer.token_bytes(token)
            # A special token may be left out of the text: a BOS that was added, or all of them.
            shown = token not in self._tokenizer.special_ids or echo.startswith(data.decode("utf-8", "replace"), at)
            triples.append((token, score, offsets.take(data if shown else b"")))
            at = offsets.take(b"")
        return completion_entries(self._tokenizer, triples, self._echo_top)

    def _by_token(self, token: int, score: TokenLogprobs | None) -> JSON | None:
        """The token itself, then the likeliest ones."""
        if score is None:
            return None
        ranked = [(token, score.chosen, score.rank)]
        ranked += [(id_, value, rank) for rank, (id_, value) in enumerate(score.top[: self._top], 1) if id_ != token]
        return {
            str(id_): {"logprob": finite(value), "rank": rank, "decoded_token": token_text(self._tokenizer, id_)}
            for id_, value, rank in ranked
        }


def finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB


def token_text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> JSON:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}
