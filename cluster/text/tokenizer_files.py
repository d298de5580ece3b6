"""The files of a checkpoint that say what its tokenizer is: tokenizer.json or tiktoken.model, the special tokens, the
chat templates, and which tokens end a text."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text import deepseek_v32_template
from isotherm.cluster.text.chat_template import DEFAULT, SPECIAL_TOKENS, TOOL_USE, ChatTemplate
from isotherm.cluster.text.chat_trouble import chat_trouble
from isotherm.cluster.text.tiktoken_vocabulary import CLASS, TiktokenError, check_class, read_tiktoken
from isotherm.cluster.text.tiktoken_vocabulary import FILE as TIKTOKEN

TOKENIZERS = ("tokenizer.json", TIKTOKEN)

log = logging.getLogger(__name__)


class TokenizerError(IsothermError, ValueError):
    """The checkpoint's tokenizer files are missing or can't be used. Names the file."""


def has_tokenizer(directory: Path) -> bool:
    """Whether there is a file that `tokenizer_file` gives."""
    return any((directory / name).is_file() for name in TOKENIZERS)


def tokenizer_file(directory: Path) -> Path:
    """tokenizer.json, or tiktoken.model where that is not there. Raises TokenizerError where neither is, or the latter
    is of an unknown kind."""
    for name in TOKENIZERS:
        if (path := directory / name).is_file():
            if name == TIKTOKEN:
                try:
                    check_class(path, read_json(directory / "tokenizer_config.json"))
                except TiktokenError as error:
                    raise TokenizerError(str(error)) from None
            return path
    raise TokenizerError(
        f"{directory / 'tokenizer.json'}: not found, nor is {TIKTOKEN}. These two formats are read; a model that comes "
        "with tokenizer.model or tekken.json is not supported, unless its vocabulary is converted first"
    )


def read_backend(directory: Path, config: JSON) -> tokenizers.Tokenizer:
    """The tokenizer of the file that is there; `config` is the decoded tokenizer_config.json. Raises TokenizerError."""
    path = tokenizer_file(directory)
    if path.name == TIKTOKEN:
        try:
            return read_tiktoken(directory, config)
        except TiktokenError as error:
            raise TokenizerError(str(error)) from None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise TokenizerError(f"{path}: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    _add_named_tokens(backend, config)
    return backend


def _add_named_tokens(backend: tokenizers.Tokenizer, config: JSON) -> None:
    """As in transformers, the tokens of tokenizer_config.json's added_tokens_decoder are added to those of
    tokenizer.json, and their flags replace those that it gives. A new token gets the next id that is free. One that the
    field has under another id than it would have is of an older tokenizer.json: it is left as it is, with a warning.
    Raises TokenizerError."""
    named, what = config.get("added_tokens_decoder") or {}, "tokenizer_config.json: added_tokens_decoder"
    try:
        tokens = {int(id_): _added_token(entry) for id_, entry in named.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{what} must be an object of ids and tokens ({error!r})") from None
    there = backend.get_added_tokens_decoder()
    free = max([backend.get_vocab_size(with_added_tokens=False), *(id_ + 1 for id_ in there)])
    for id_, token in sorted(tokens.items()):
        known = backend.token_to_id(token.content)
        if (found := free if known is None else known) != id_:
            log.warning("%s says that %r is %d; with tokenizer.json it is %d", what, token.content, id_, found)
        elif repr(token) != repr(there.get(id_)):
            backend.add_tokens([token])
            free += known is None


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    special = bool(entry.get("special", False))
    flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip")}
    return AddedToken(entry["content"], special=special, normalized=bool(entry.get("normalized", not special)), **flags)


def set_post_processor(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """What transformers' fast tokenizers do: an explicit add_bos_token or add_eos_token replaces tokenizer.json's
    post-processor; the classes of LlamaTokenizer add a BOS unless told otherwise; else tokenizer.json's own decides."""
    llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    if not (llama or "add_bos_token" in config or "add_eos_token" in config):
        return
    wanted = {"bos_token": config.get("add_bos_token", llama), "eos_token": config.get("add_eos_token", False)}
    ids = {name: backend.token_to_id(special[name]) for name, on in wanted.items() if on and name in special}
    if missing := [name for name, id_ in ids.items() if id_ is None]:
        raise TokenizerError(
            f"tokenizer_config.json: {missing[0]} {special[missing[0]]!r} is not in tokenizer.json's vocabulary"
        )
    bos = [special["bos_token"]] if "bos_token" in ids else []
    eos = [special["eos_token"]] if "eos_token" in ids else []
    backend.post_processor = TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *bos, "$B:1", *eos],
        special_tokens=[(special[name], id_) for name, id_ in ids.items()],
    )


def read_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. As in transformers chat_template.jinja, with additional_chat_templates/ beside it, wins
    over tokenizer_config.json; the older chat_template.json comes last. Where there is none of them, the family's own
    encoding of messages, if it has one that is known here."""
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (jinja := directory / "chat_template.jinja").is_file():
        files["default"] = jinja
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    path, found = directory / "tokenizer_config.json", config.get("chat_template")
    if found is None:
        path = directory / "chat_template.json"
        found = read_json(path).get("chat_template")
    if found is None:
        own = read_json(directory / "config.json").get("model_type") == deepseek_v32_template.MODEL_TYPE
        return {"default": deepseek_v32_template.TEMPLATE} if own else {}
    if isinstance(found, str):
        return {"default": found}
    try:
        named = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(part, str) for pair in named.items() for part in pair):
        raise TokenizerError(
            f"{path}: chat_template must be a string or a list of {{name, template}}, got {str(found)[:80]!r}"
        )
    return named


def read_json(path: Path) -> JSON:
    """The file's object, or an empty one when there is no such file."""
    if not path.is_file():
        return {}
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read ({error})") from None


def special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The text of each of SPECIAL_TOKENS that the checkpoint names; `config` is the decoded tokenizer_config.json."""
    named = {**read_json(directory / "special_tokens_map.json"), **config}
    return {name: text for name in SPECIAL_TOKENS if (text := token_text(named.get(name))) is not None}


def token_text(value: Any) -> str | None:
    """A token written as a string or as an AddedToken's dict."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def eos_ids(config: JSON, path: Path) -> list[int]:
    """The tokens that end a text, by a decoded config.json or generation_config.json: its own, or its text model's."""
    text = config.get("text_config")
    value = config.get("eos_token_id")
    if value is None and isinstance(text, dict):
        value = text.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(id_) is int for id_ in ids):
        raise TokenizerError(f"{path}: eos_token_id must be an int or a list of ints, got {value!r}")
    return ids


@dataclass(frozen=True)
class Described:
    """What a checkpoint's files say of its text, without a vocabulary being read. `template`: the text of the one for
    chats with tools, empty where there is none."""

    tokenizer: str
    template_from: str
    template: str
    not_supported: tuple[str, ...]


def described(directory: Path) -> Described:
    """Of the checkpoint's files none must be there. Raises TokenizerError."""
    config = read_json(directory / "tokenizer_config.json")
    templates = read_templates(directory, config)
    refused: list[str] = []
    if not has_tokenizer(directory):
        refused.append("text: there is neither tokenizer.json nor tiktoken.model, so that token ids alone are taken")
        tokenizer = "none"
    elif (directory / TOKENIZERS[0]).is_file():
        tokenizer = TOKENIZERS[0]
    else:
        tokenizer = f"{TIKTOKEN}, converted when it is loaded"
        if (found := config.get("tokenizer_class")) != CLASS:
            refused.append(f"text: {TIKTOKEN} is of tokenizer_class {found!r}; known is {CLASS!r}")
    if not templates:
        refused.append("chats: there is no chat template")
    refused += [f"chats: {words}" for words in trouble_with_chats(directory)]
    return Described(tokenizer, _template_source(directory, config), template_for_tools(templates), tuple(refused))


def trouble_with_chats(directory: Path) -> list[str]:
    """As `chat_trouble` says of the checkpoint's templates. Raises TokenizerError."""
    config = read_json(directory / "tokenizer_config.json")
    if not (templates := read_templates(directory, config)):
        return []
    template = ChatTemplate(templates, special_tokens=special_tokens(directory, config))
    try:
        return chat_trouble(template)
    finally:
        template.close()


def _template_source(directory: Path, config: JSON) -> str:
    if (directory / "chat_template.jinja").is_file() or (directory / "additional_chat_templates").is_dir():
        return "chat_template.jinja"
    if config.get("chat_template") is not None:
        return "tokenizer_config.json"
    if (directory / "chat_template.json").is_file():
        return "chat_template.json"
    return "Isotherm's own, of the family's encoding of messages" if read_templates(directory, config) else "none"


def template_for_tools(templates: Mapping[str, str]) -> str:
    return templates.get(TOOL_USE, templates.get(DEFAULT, ""))
