"""From what a client asks the output to be (JSON after a schema, a regular expression, one of several texts, a grammar)
to llguidance's grammar text. Compiles nothing: cluster/text/grammar_vocabulary.py does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from isotherm.cluster.errors import one_line
from isotherm.cluster.text.json_schema import GrammarError, plain_schema

# JSON as models write it, on one line: a space may follow a comma or a colon, and there is no other white space, which
# a model could go on with for ever.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?", "lenient": False}
MOST_CHARS = 128 * 1024  # of a grammar's text: as much compiles in well under a second
MOST_NESTED = 100  # brackets in brackets: the compiler calls itself for each
# Strings, regular expressions and comments of Lark, in which `<name>` is text; and names of special tokens. Escapes
# elsewhere are stepped over: after each escaped quote a search for a string's end would go over the rest of the text.
_LARK_PARTS = re.compile(
    r'\\.|"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/|(?P<name><[^<>\s]+>)', re.DOTALL
)
_DECODER = json.JSONDecoder()
_BACKSLASHES = re.compile(r"\\*$")
_JSON_OR_PART = re.compile(rf"%json\s*|{_LARK_PARTS.pattern}", _LARK_PARTS.flags)
# How `%json` is written where it is text, by how such a part begins.
_JSON_AS_TEXT = {'"': "%\\u006ason", "/": "%\\x6ason", "//": "% json", "#": "% json"}


def json_object() -> str:
    """Any JSON object."""
    return json_schema({"type": "object"})


def json_schema(schema: Any) -> str:
    """JSON that is valid by the schema: an object, or true. Raises GrammarError, which names the keyword that is not
    supported."""
    text = _dumped(schema)
    _check_size(text, "the schema")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError(f"a schema is an object, or true for any JSON, got {text[:60]}")
    plain = plain_schema(schema)
    try:
        return LLMatcher.grammar_from_json_schema(plain, overrides=_JSON)
    except ValueError as error:  # a number of more than 64 bits
        raise GrammarError(f"the schema cannot be read: {one_line(error)[:200]}") from None


def regex(pattern: str) -> str:
    """A text that the pattern matches as a whole; anchors at its ends say nothing more."""
    _check_size(pattern, "the regular expression")
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$") and len(_BACKSLASHES.findall(pattern[:-1])[0]) % 2 == 0:
        pattern = pattern[:-1]
    return LLMatcher.grammar_from_regex(pattern)


def choice(options: Iterable[str]) -> str:
    """One of the texts."""
    options = list(options)
    if not options or not all(options):
        raise GrammarError("a choice needs at least one text, and each at least one character")
    text = " | ".join(map(_quoted, options))
    _check_size(text, "the choice")
    return f"start: CHOICE\nCHOICE: {text}\n"


def grammar(text: str, special_tokens: Mapping[str, int]) -> str:
    """A grammar in llguidance's Lark, in which `<name>` is one of the special tokens, or in EBNF as llama.cpp writes it
    (GBNF), which is told by its `::=`."""
    _check_size(text, "the grammar")
    _check_nesting(text)
    if "::=" in text:
        try:
            text = str(any_to_lark(text))
        except Exception as error:  # the converter raises what comes
            raise GrammarError(f"the EBNF grammar cannot be read: {one_line(error)}") from error
    if text.lstrip().startswith("{"):  # llguidance's JSON form, whose schemas nobody has looked at
        raise GrammarError("the grammar begins with '{'; it is Lark or EBNF, and a JSON schema is given as a schema")
    text = _with_plain_schemas(text)

    def by_id(match: re.Match[str]) -> str:
        name = match["name"]
        if name is None or name.startswith("<["):
            return match[0]
        if name not in special_tokens:
            raise GrammarError(f"the grammar names {name}, which is no special token of this model")
        return f"<[{special_tokens[name]}]>"

    return _LARK_PARTS.sub(by_id, text)


def _with_plain_schemas(text: str) -> str:
    """Lark in which `%json` stands before schemas that the compiler can take, and nowhere else: what it reads as the
    beginning of a schema does not hang on where we see strings and comments."""
    if "%json" not in text:
        return text
    out, at = [], 0
    while (part := _JSON_OR_PART.search(text, at)) is not None:
        out.append(text[at : part.start()])
        at = part.end()
        if not part[0].startswith("%json"):
            begin = "//" if part[0].startswith("//") else part[0][0]
            if begin not in _JSON_AS_TEXT and "%json" in part[0]:
                raise GrammarError(f"the grammar names {part[0]}, which is no special token of this model")
            out.append(part[0].replace("%json", _JSON_AS_TEXT.get(begin, "")))
            continue
        try:
            schema, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"what follows %json is no schema: {one_line(error)}") from None
        plain = json.dumps(plain_schema(schema)).replace("%json", _JSON_AS_TEXT['"'])
        out.append(f"%json {plain}")
    return "".join([*out, text[at:]])


def literal(text: str, special_tokens: Mapping[str, int]) -> str:
    """Lark, for a rule's right side, of just this text, in which the text of a special token stands for that token
    (`special_tokens` has its id). As text it could only be spelt out."""
    if not text:
        return '""'
    names = sorted((name for name in special_tokens if name), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return " ".join(
        f"<[{special_tokens[part]}]>" if part in special_tokens else _quoted(part) for part in parts if part
    )


def _quoted(text: str) -> str:
    """As a string of Lark: JSON's, but without a raw DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise GrammarError(f"the schema is nested deeper than {MOST_NESTED}") from None


def _check_size(text: str, what: str) -> None:
    if len(text) > MOST_CHARS:
        raise GrammarError(f"{what} has {len(text)} characters; at most {MOST_CHARS} are taken")


def _check_nesting(text: str) -> None:
    depth = deepest = 0
    for bracket in re.findall(r"[()\[\]{}]", text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    if deepest > MOST_NESTED:
        raise GrammarError(f"the grammar has brackets nested {deepest} deep; at most {MOST_NESTED} are taken")
