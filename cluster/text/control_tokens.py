"""Token ids of a rendered chat in which only the template's own text makes control tokens.

What a client writes may look like a control token (`<｜User｜>`, `</think>`); it is encoded as the text that it is.
Where nothing of the kind stands in a prompt, its ids are those of the whole text encoded at once, as transformers does
it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection

import tokenizers

from isotherm.cluster.text.chat_template import RenderedChat


class ControlTokens:
    """The added tokens of a tokenizer that mean something apart from their text: all but white space, whether they are
    flagged special or not (`<think>` and the markers of tools are not). Thread-safe."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._tokens = {token.content: (id_, token) for id_, token in added.items() if not token.content.isspace()}
        self.ids = frozenset(id_ for id_, _ in self._tokens.values())
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._plain: _PlainBackend | None = None
        self._lock = threading.Lock()

    def encode(self, chat: RenderedChat) -> list[int]:
        placed = self._placed(chat)
        ids = _encode(self._backend, [chat.text])[0]
        if [id_ for id_ in ids if id_ in self.ids] == [id_ for _, _, id_ in placed]:
            return ids
        ends = [0, *(end for _, end, _ in placed)]
        begins = [*(begin for begin, _, _ in placed), len(chat.text)]
        pieces = self._as_text([chat.text[end:begin] for end, begin in zip(ends, begins, strict=True)])
        for piece, (_, _, id_) in zip(pieces, placed, strict=False):
            piece.append(id_)
        return [id_ for piece in pieces for id_ in piece]

    def _placed(self, chat: RenderedChat) -> list[tuple[int, int, int]]:
        """(begin, end, id) of each control token in the template's own text, with the white space that it takes in."""
        found: list[tuple[int, int, int]] = []
        text, last = chat.text, 0
        for begin, end in zip(chat.own[::2], chat.own[1::2], strict=True):
            for match in self._pattern.finditer(text, max(begin, last), end):
                id_, token = self._tokens[match[0]]
                first, last = match.span()
                while token.lstrip and first > (found[-1][1] if found else 0) and text[first - 1].isspace():
                    first -= 1
                while token.rstrip and last < len(text) and text[last].isspace():
                    last += 1
                found.append((first, last, id_))
        return found

    def _as_text(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts in which nothing is a control token."""
        with self._lock:
            if self._plain is None:
                self._plain = _PlainBackend(self._backend, self._tokens)
        pieces = self._plain.encode(texts)
        for at, piece in enumerate(pieces):
            if not self.ids.isdisjoint(piece):  # a vocabulary that holds the markers as words too
                pieces[at] = [id_ for char in self._plain.encode(list(texts[at])) for id_ in char]
        return pieces


class _PlainBackend:
    """A tokenizer without some of its added tokens."""

    def __init__(self, whole: tokenizers.Tokenizer, without: Collection[str]) -> None:
        described = json.loads(whole.to_str())
        kept = [token for token in described["added_tokens"] if token["content"] not in without]
        self._backend = tokenizers.Tokenizer.from_str(json.dumps({**described, "added_tokens": kept}))
        # Added tokens that the vocabulary does not hold are numbered anew.
        renumbered = {self._backend.token_to_id(token["content"]): token["id"] for token in kept}
        self._ids = {mine: id_ for mine, id_ in renumbered.items() if mine != id_}

    def encode(self, texts: list[str]) -> list[list[int]]:
        pieces = _encode(self._backend, texts)
        return [[self._ids.get(id_, id_) for id_ in piece] for piece in pieces] if self._ids else pieces


def _encode(backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    # encode() holds the GIL; the batch call lets it go, so that an event loop in another thread goes on.
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
