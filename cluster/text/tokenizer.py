"""Text to token ids and back: a checkpoint's tokenizer, its special tokens and chat template.

Knows nothing about HTTP, requests or engines."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.text.byte_alphabet import BYTE_OF
from isotherm.cluster.text.chat_prompt import continued, is_in_thought, template_messages, to_be_continued
from isotherm.cluster.text.chat_template import ChatTemplate
from isotherm.cluster.text.control_tokens import ControlTokens
from isotherm.cluster.text.detokenizer import TextStream
from isotherm.cluster.text.grammar_vocabulary import GrammarVocabulary
from isotherm.cluster.text.template_traits import TemplateTraits
from isotherm.cluster.text.tiktoken_vocabulary import CLASS as TIKTOKEN_CLASS
from isotherm.cluster.text.tokenizer_files import (
    TokenizerError,
    eos_ids,
    read_backend,
    read_json,
    read_templates,
    set_post_processor,
    special_tokens,
    template_for_tools,
)

log = logging.getLogger(__name__)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class NoChatTemplateError(IsothermError, ValueError):
    """The checkpoint has no chat template, so it can only complete text."""


@dataclass(frozen=True)
class ChatPrompt:
    """The prompt of a chat, and the traits of the template that made it. `in_thought`: it ends inside a thought, which
    the output goes on with."""

    ids: list[int]
    text: str
    in_thought: bool
    traits: TemplateTraits


class Tokenizer:
    """One checkpoint's tokenizer. Thread-safe: nothing changes after loading but caches.

    `eos_token_ids` is the union of what tokenizer_config.json, generation_config.json and config.json name: checkpoints
    are known to put an end-of-turn token in only one of the three."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Iterable[int] = (),
        chat_template: ChatTemplate | None = None,
        control_tokens_anywhere: bool = False,
        sorts_tools: bool = False,
    ) -> None:
        """`control_tokens_anywhere`: those that stand in the messages of a chat count too, as elsewhere they do.
        `sorts_tools`: as TemplateTraits has it."""
        self._backend = backend
        self._bos = special_tokens.get("bos_token")
        self.chat_template = chat_template
        self._sorts_tools = sorts_tools
        self._traits: dict[str, TemplateTraits] = {}
        self._control_tokens = None if control_tokens_anywhere else ControlTokens(backend)
        special_ids = {id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special}
        named_ids = {name: backend.token_to_id(token) for name, token in special_tokens.items()}
        special_ids.update(id_ for id_ in named_ids.values() if id_ is not None)
        eos = named_ids.get("eos_token")
        self.eos_token_ids = frozenset(eos_token_ids) | (frozenset() if eos is None else {eos})
        self.special_ids = frozenset(special_ids)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._to_bytes = _bytes_rule(backend)
        self._bytes: dict[int, bytes] = {}
        self._grammar_vocabularies: dict[int, GrammarVocabulary] = {}

    @classmethod
    def load(cls, directory: Path, *, control_tokens_anywhere: bool = False) -> Tokenizer:
        """Reads tokenizer.json or tiktoken.model, tokenizer_config.json, special_tokens_map.json,
        generation_config.json, config.json and the chat templates. Only the first must be there. Raises
        TokenizerError."""
        config = read_json(directory / "tokenizer_config.json")
        backend = read_backend(directory, config)
        special = special_tokens(directory, config)
        set_post_processor(backend, config, special)
        if (end := special.get("eos_token")) is not None and backend.token_to_id(end) is None:
            log.warning("%s: its eos_token %r is no token of the vocabulary, and so ends no text", directory, end)
        eos: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            eos.update(eos_ids(read_json(directory / name), directory / name))
        templates = read_templates(directory, config)
        return cls(
            backend,
            special_tokens=special,
            eos_token_ids=eos,
            chat_template=ChatTemplate(templates, special_tokens=special) if templates else None,
            control_tokens_anywhere=control_tokens_anywhere,
            sorts_tools=config.get("tokenizer_class") == TIKTOKEN_CLASS,
        )

    @property
    def tool_template(self) -> str:
        """The text of the template for chats with tools; empty where there is none."""
        return template_for_tools({} if self.chat_template is None else self.chat_template.sources)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. `add_special_tokens` lets the post-processor add a BOS (and EOS) as transformers' tokenizer
        would."""
        # encode() holds the GIL; the batch call lets it go, so that an event loop in another thread goes on.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As `encode`, with one BOS where the text begins with it by itself."""
        ids = self.encode(text, add_special_tokens)
        bos = self._bos
        if add_special_tokens and bos and text.startswith(bos):
            own = self.encode(text, add_special_tokens=False)
            if own[:1] == [self._backend.token_to_id(bos)] == ids[:1] and len(ids) > len(own):
                return ids[1:]
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        to_bytes = self.visible_bytes if skip_special_tokens else self.token_bytes
        return b"".join(map(to_bytes, token_ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for. Nothing for an id that has no token: models pad their vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self._backend.id_to_token(token_id)
            found = self._bytes[token_id] = b"" if token is None else self._to_bytes(token)
        return found

    def token_string(self, token_id: int) -> str:
        """The token as its vocabulary writes it; nothing for an id that has no token."""
        return self._backend.id_to_token(token_id) or ""

    def visible_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, but nothing for a special token."""
        return b"" if token_id in self.special_ids else self.token_bytes(token_id)

    def stream(
        self,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        tags: Callable[[], Collection[str]] = tuple,
        least_tokens: int = 0,
        include_stop: bool = False,
    ) -> TextStream:
        """A detokeniser for one reply. `tags`, asked at each special token, gives those that are not to be skipped;
        `least_tokens` and `include_stop` as TextStream has them."""
        if not skip_special_tokens:
            return TextStream(self.token_bytes, stop, least_tokens, include_stop=include_stop)

        def hidden_text(token_id: int) -> str:
            if token_id not in self.special_ids:
                return ""
            text = self.token_bytes(token_id).decode("utf-8", "replace")
            return "" if text in tags() else text

        def visible_or_tag(token_id: int) -> bytes:
            return b"" if hidden_text(token_id) else self.token_bytes(token_id)

        special = [self.token_bytes(id_).decode("utf-8", "replace") for id_ in self.special_ids] if stop else []
        spelled = [text for text in stop if any(token and token in text for token in special)]
        return TextStream(
            visible_or_tag, stop, least_tokens, include_stop=include_stop, spelled=spelled, hidden_text=hidden_text
        )

    def token_id(self, token: str) -> int | None:
        """The id of the token that is written like this, if there is one."""
        id_: int | None = self._backend.token_to_id(token)
        return id_

    @property
    def control_tokens(self) -> dict[str, int]:
        """Ids of the added tokens, by how they are written. DeepSeek does not mark all of them as special."""
        return {token.content: id_ for id_, token in self._backend.get_added_tokens_decoder().items()}

    def grammar_vocabulary(self, size: int) -> GrammarVocabulary:
        """For grammars over a model's vocabulary of this size. Raises TokenizerError where no token ends a text."""
        if not self.eos_token_ids:
            raise TokenizerError("the tokenizer names no eos_token, so a text by a grammar could not end")
        made = self._grammar_vocabularies.get(size)
        if made is None:
            new = GrammarVocabulary(self._backend.to_str, min(self.eos_token_ids), max(size, self.vocab_size), size)
            made = self._grammar_vocabularies.setdefault(size, new)
        return made

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        check_text: Callable[[str], None] | None = None,
    ) -> ChatPrompt:
        """The prompt of a chat, by the model's template (of several, the one named). Calls may have their arguments as
        JSON text or as an object. With `continue_final_message` the output goes on with the last message, and no new
        one is begun. Blocks for at most the template's time limit, and for the tokenisation, before which `check_text`
        is given the prompt's text. Raises NoChatTemplateError, ChatTemplateError, and what `check_text` raises."""
        traits = self.template_traits(template, tools=tools is not None)
        told = template_messages(messages, traits)
        context = {
            **(template_kwargs or {}),
            "messages": to_be_continued(told) if continue_final_message else told,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        chat = traits.render(context)
        if continue_final_message:
            chat = continued(chat, told[-1])
        if check_text is not None:
            check_text(chat.text)
        control = self._control_tokens
        ids = self.encode(chat.text, add_special_tokens=False) if control is None else control.encode(chat)
        return ChatPrompt(ids, chat.text, is_in_thought(chat, continue_final_message), traits)

    def template_traits(self, template: str | None = None, *, tools: bool = False) -> TemplateTraits:
        """What the model's template (of several, the one named, or the one for chats with tools) makes of calls, tools
        and thinking. Raises NoChatTemplateError, ChatTemplateError."""
        if self.chat_template is None:
            raise NoChatTemplateError("this model has no chat template; use /v1/completions")
        name = self.chat_template.choose(template, tools=tools)
        return self._traits.setdefault(name, TemplateTraits(self.chat_template, name, sorts_tools=self._sorts_tools))


def _bytes_rule(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """How a token's string becomes bytes, by the tokenizer's decoder: byte-level BPE (DeepSeek), or sentencepiece with
    byte fallback."""
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    kinds = {decoder.get("type"), *(step.get("type") for step in decoder.get("decoders", ()))}
    if "ByteLevel" in kinds:

        def byte_level(token: str) -> bytes:
            # As tokenizers does it: a token with any character outside the alphabet (an added token) stands for its own
            # text.
            try:
                return bytes(BYTE_OF[char] for char in token)
            except KeyError:
                return token.encode()

        return byte_level
    if "ByteFallback" in kinds:

        def byte_fallback(token: str) -> bytes:
            match = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()

        return byte_fallback
    raise TokenizerError(
        f"tokenizer.json: decoder {decoder.get('type')!r} is not supported; expected ByteLevel, "
        "or a Sequence with ByteFallback"
    )
