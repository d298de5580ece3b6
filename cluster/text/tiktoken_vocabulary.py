"""A tiktoken vocabulary (`tiktoken.model`, as Kimi's and Moonlight's checkpoints have it) as a tokenizer of the
`tokenizers` library. No code of a checkpoint is run: what its tokenizer class does is said here.

The file has a line for each token: its bytes in base64, and its rank, which is its id. tiktoken merges two neighbours
where together they are a token, of all that could be merged those with the lowest rank first; so the merges here are
all the ways in which two tokens are a third one, in the order of ranks."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.byte_alphabet import BYTE_CHARS

FILE = "tiktoken.model"
CLASS = "TikTokenTokenizer"  # tokenizer_config.json's tokenizer_class of the checkpoints that this is written for
RESERVED = 256  # ids behind the vocabulary that are special tokens, whether they have a name or not
# How text is cut before it is merged: Han characters apart from other letters, at most three digits together. Source:
# tokenization_kimi.py of moonshotai/Kimi-K2-Instruct.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join([
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip


class TiktokenError(IsothermError, ValueError):
    """tiktoken.model cannot be used. Names the file and the line."""


def read_tiktoken(directory: Path, config: JSON) -> tokenizers.Tokenizer:
    """From tiktoken.model, and the checkpoint's decoded tokenizer_config.json. Raises TiktokenError."""
    path = directory / FILE
    check_class(path, config)
    ranks = read_ranks(path)
    vocabulary = {_written(token): rank for token, rank in ranks.items()}
    special = _special_tokens(config, len(ranks))
    clash = [text for text in special if text in vocabulary]
    if clash:
        raise TiktokenError(f"{path}: {clash[0]!r} is a token of the vocabulary and a special one")
    numbered = {text: len(ranks) + i for i, text in enumerate(special)}
    model = models.BPE({**vocabulary, **numbered}, merges_of(ranks), ignore_merges=True)
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(text, special=flag, normalized=False) for text, flag in special.items()])
    return made


def check_class(path: Path, config: JSON) -> None:
    """Raises TiktokenError where it is not known how text is cut."""
    if (found := config.get("tokenizer_class")) != CLASS:
        raise TiktokenError(
            f"{path}: how text is cut before its vocabulary applies is in code that comes with the checkpoint, which "
            f'is never run; known is that of tokenizer_class "{CLASS}", and tokenizer_config.json says {found!r}'
        )


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token → rank, of which each from 0 on is there once. Raises TiktokenError."""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TiktokenError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            text, rank = line.split()
            ranks[base64.b64decode(text, validate=True)] = int(rank)
        except ValueError:
            raise TiktokenError(
                f"{path}: line {number} is {line[:40]!r}; it must be a token in base64 and its rank"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TiktokenError(f"{path}: its ranks must be 0 to {len(ranks) - 1}, each once")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TiktokenError(f"{path}: has no token for the byte 0x{missing[0]:02x}; every byte must be one")
    return ranks


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that is a token together, by its rank; of one token's pairs those first that begin with the
    earlier token."""
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [
            (ranks[token[:at]], ranks[token[at:]], at)
            for at in range(1, len(token))
            if token[:at] in ranks and token[at:] in ranks
        ]
        merges += [(_written(token[:at]), _written(token[at:])) for _, _, at in sorted(pairs)]
    return merges


def _special_tokens(config: JSON, first: int) -> dict[str, bool]:
    """Text of each reserved id, in order, and whether it is flagged special: as tokenizer_config.json names it, or by
    the name that ids without one have."""
    named = config.get("added_tokens_decoder") or {}
    tokens: dict[str, bool] = {}
    for id_ in range(first, first + RESERVED):
        entry = named.get(str(id_)) if isinstance(named, dict) else None
        entry = entry if isinstance(entry, dict) and isinstance(entry.get("content"), str) else {}
        text = entry.get("content", f"<|reserved_token_{id_}|>")
        if text in tokens:
            raise TiktokenError(f"tokenizer_config.json: added_tokens_decoder has {text!r} for two ids, {id_} is one")
        tokens[text] = bool(entry.get("special", True))
    return tokens


def _written(token: bytes) -> str:
    """As byte-level vocabularies of `tokenizers` write it: a character for each byte."""
    return "".join(BYTE_CHARS[byte] for byte in token)
