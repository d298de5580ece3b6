"""Checkpoints' tokenizer files in tiktoken's format, with a vocabulary that is trained here on text in many scripts."""

from __future__ import annotations

import base64
import json
import random
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# As tokenization_kimi.py of moonshotai/Kimi-K2-Instruct has it, in tiktoken's own words.
KIMI_PATTERN = "|".join([
    r"""[\p{Han}]+""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"""
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"""
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
    r"""\p{N}{1,3}""",
    r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
    r"""\s*[\r\n]+""",
    r"""\s+(?!\S)""",
    r"""\s+""",
])  # fmt: skip
RESERVED = 256
NAMED = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 10: "<|im_middle|>",
         11: "<|tool_calls_section_begin|>", 20: "[EOT]", 22: "<think>", 23: "</think>", 255: "[PAD]"}  # fmt: skip
PLAIN = {"<|tool_calls_section_begin|>", "<think>", "</think>"}  # named, and not flagged special
# Words of languages, so that there is something to merge in each script.
_TEXT = (
    "the quick brown fox isn't jumping; we'll SHOUT, they've CamelCase and snake_case e.g. HTTPServer don'T "
    "Übergröße naïve façade œuvre żółć İstanbul ěščřž ĳsselmeer été où Kürbis "
    "日本語のテキスト 東京都 漢字かな交じり カタカナ "
    "你好世界 北京大学 人工智能 繁體中文 機器學習 한국어 서울특별시 대한민국 "
    "Привет мир Москва Україна Ελλάδα Αθήνα καλημέρα שלום עולם مرحبا بالعالم العربية हिन्दी नमस्ते தமிழ் বাংলা ไทย สวัสดี "
    "ქართული հայերեն አማርኛ ᠮᠣᠩᠭᠣᠯ ភាសាខ្មែរ မြန်မာ ລາວ བོད་ 𝒜𝓁𝑔𝑒𝒷𝓇𝒶 👩‍👩‍👧‍👦 🇩🇪 😀😃 ① Ⅷ ½ ²³ ٣٤٥ १२३ 1234567890 3.14159 "
    "0x1F4A9 → ∑∫ «quoted» “curly” — … \u00a0nbsp\u3000wide\u200bzero e\u0301 ﬁ ǅ ʰ ª º"
)
WORDS = _TEXT.split(" ")


def mixed_text(size: int, seed: int = 0) -> str:
    """About `size` UTF-8 bytes of text: words of many scripts with all kinds of space and punctuation between them,
    names of characters with the characters, and characters of every assigned block."""
    draw = random.Random(seed)
    parts: list[str] = []
    length = 0
    while length < size:
        part = draw.choice(_WAYS)(draw)
        parts.append(part)
        length += len(part.encode())
    return "".join(parts)


def _words(draw: random.Random) -> str:
    between = draw.choice([" ", " ", " ", "\n", "", "  ", "\t", ", ", "\r\n", "-", "\n\n  ", "'s ", "。", "_"])
    return between.join(draw.choices(WORDS, k=draw.randint(1, 12))) + draw.choice([" ", "\n", ". ", ""])


def _named(draw: random.Random) -> str:
    start = draw.choice(assigned())
    characters = [chr(start + i) for i in range(draw.randint(1, 9)) if start + i in _assigned_set()]
    return " ".join(f"{char} {unicodedata.name(char, '')}" for char in characters) + "\n"


def _run(draw: random.Random) -> str:
    return draw.choice(WORDS)[: draw.randint(1, 3)] * draw.randint(2, 30)


def _letters(draw: random.Random) -> str:
    start = draw.choice(assigned())
    return "".join(chr(c) for c in range(start, start + draw.randint(2, 20)) if c in _assigned_set())


_WAYS = (_words, _words, _words, _words, _named, _run, _letters)


@cache
def assigned() -> list[int]:
    """Code points with a character that Python's tables know, surrogates and private ones left out."""
    return [c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]


@cache
def _assigned_set() -> frozenset[int]:
    return frozenset(assigned())


def trained_ranks(text: str, size: int) -> dict[bytes, int]:
    """A byte-level vocabulary of about `size` tokens that is trained on a text, as tiktoken's ranks."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(KIMI_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(text.splitlines(keepends=True), trainer)
    return {_bytes_of(token): rank for token, rank in trained.get_vocab().items()}


def _bytes_of(token: str) -> bytes:
    return bytes(_byte_characters()[char] for char in token)


@cache
def _byte_characters() -> dict[str, int]:
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def write_tiktoken(directory: Path, ranks: dict[bytes, int], **config: Any) -> Path:
    """tiktoken.model and tokenizer_config.json. `config` goes into the latter."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (directory / "tiktoken.model").write_text("".join(lines))
    first = len(ranks)
    added = {str(first + i): {"content": text, "special": text not in PLAIN} for i, text in NAMED.items()}
    values = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]",
              "added_tokens_decoder": added, **config}  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return directory


def oracle(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """As the checkpoint's own tokenizer class makes it."""
    first = len(ranks)
    special = {NAMED.get(i, f"<|reserved_token_{first + i}|>"): first + i for i in range(RESERVED)}
    return tiktoken.Encoding("kimi", pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def pieces(text: str, size: int) -> Iterator[str]:
    """The text in pieces, cut between lines: tiktoken's own recursion does not take long ones."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length >= size:
            yield "".join(piece)
            piece, length = [], 0
    yield "".join(piece)


def differences(ours: Iterable[list[int]], theirs: Iterable[list[int]]) -> int:
    """How many ids differ, or are there on one side alone."""
    count = 0
    for mine, other in zip(ours, theirs, strict=True):
        if mine != other:
            count += sum(a != b for a, b in zip(mine, other, strict=False)) + abs(len(mine) - len(other))
    return count
