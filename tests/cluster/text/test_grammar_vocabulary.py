"""Grammars over a tokenizer: its control tokens, what is kept of what was compiled, and what costs too much."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from grammars import tiny_tokenizer, tiny_vocabulary
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from isotherm.cluster.text import grammar_vocabulary
from isotherm.cluster.text.grammar import choice, json_object, json_schema, literal, regex
from isotherm.cluster.text.grammar_vocabulary import GrammarVocabulary, error_of
from isotherm.cluster.text.json_schema import GrammarError
from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.cluster.text.tokenizer_files import TokenizerError

EOS, CALLS, SEP = "<｜end▁of▁sentence｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    """Marked as DeepSeek-V3 has it: `<think>` and the tools' tokens are added, but not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)} | {'{"': 256, '":': 257}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("{", '"'), ('"', ":")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([EOS])
    made.add_tokens([AddedToken(name, normalized=True) for name in ("<think>", "</think>", CALLS, SEP)])
    made.add_tokens([AddedToken("für", normalized=False)])
    return made


@pytest.fixture(scope="module")
def vocabulary(backend: tokenizers.Tokenizer) -> GrammarVocabulary:
    return GrammarVocabulary(backend.to_str, backend.token_to_id(EOS), 300)


def allowed(vocabulary: GrammarVocabulary, grammar: str, tokens: list[int]) -> set[int]:
    matcher = vocabulary.compiled(grammar).copy()
    assert matcher.consume_tokens(tokens), error_of(matcher)
    bits = matcher.compute_bitmask()
    return {token for token in range(vocabulary.size) if bits[token // 8] >> token % 8 & 1}


def test_control_tokens_are_no_text_also_where_the_tokenizer_does_not_mark_them(backend, vocabulary):
    control = {backend.token_to_id(name) for name in ("<think>", "</think>", CALLS, SEP)}
    quote = backend.encode('{"').ids
    for grammar, tokens in ((json_object(), quote), (regex("(?s:.*)"), [])):
        vocabulary.check(grammar)
        possible = allowed(vocabulary, grammar, tokens)
        assert not possible & control and len(possible) > 100
        assert not possible & set(range(backend.get_vocab_size(), 300)), (
            "nor what the model knows and the tokenizer not"
        )


def test_control_tokens_stand_in_a_literal_whether_they_are_marked_or_not(backend, vocabulary):
    tokens = {name: backend.token_to_id(name) for name in (CALLS, SEP, "</think>")}
    grammar = f"start: {literal(f'{CALLS}f{SEP}', tokens)} /[0-9]+/ {literal('</think>', tokens)}\n"
    vocabulary.check(grammar)
    ids = [tokens[CALLS], *backend.encode("f").ids, tokens[SEP], *backend.encode("12").ids, tokens["</think>"]]
    for i, token in enumerate(ids):
        assert token in allowed(vocabulary, grammar, ids[:i]), i
    assert allowed(vocabulary, grammar, []) == {tokens[CALLS]}
    assert allowed(vocabulary, grammar, ids) == {vocabulary.eos}


@pytest.mark.parametrize("text", ["<think>", f"a{CALLS}b", "für wen", "</think>"])
def test_a_constant_with_added_tokens_in_it_can_be_said(backend, vocabulary, text):
    """Whatever the tokenizer itself would make of such a text."""
    for grammar in (choice([text]), json_schema({"const": text})):
        vocabulary.check(grammar)
        matcher, said = vocabulary.compiled(grammar).copy(), list[int]()
        for _ in range(40):
            bits = matcher.compute_bitmask()
            possible = [token for token in range(vocabulary.size) if bits[token // 8] >> token % 8 & 1]
            if possible == [vocabulary.eos]:
                break
            said.append(possible[0])
            assert matcher.consume_token(possible[0]), error_of(matcher)
        assert possible == [vocabulary.eos]
        assert backend.decode(said, skip_special_tokens=False) in (text, f'"{text}"')


def test_what_was_compiled_is_kept_as_far_as_there_is_room(monkeypatch, backend):
    compiled: list[str] = []

    def counted(tokenizer: Any, grammar: str, **options: Any) -> Any:
        compiled.append(grammar)
        return matcher(tokenizer, grammar, **options)

    matcher = grammar_vocabulary.LLMatcher
    monkeypatch.setattr(grammar_vocabulary, "LLMatcher", counted)
    monkeypatch.setattr(grammar_vocabulary, "MATCHERS", 2)
    vocabulary = GrammarVocabulary(backend.to_str, backend.token_to_id(EOS), 300)
    a, b, c = regex("a"), regex("b"), regex("c")
    assert not vocabulary.is_ready(a)
    for grammar in (a, b, a, a, b):
        vocabulary.compiled(grammar).copy()
    assert compiled == [a, b] and vocabulary.is_ready(a)
    vocabulary.compiled(c).copy()
    assert compiled == [a, b, c] and not vocabulary.is_ready(b) and vocabulary.is_ready(a)
    vocabulary.check(a)
    vocabulary.check(a)
    assert compiled == [a, b, c, a], "verdicts are kept apart from matchers"
    for _ in range(2):
        with pytest.raises(GrammarError):
            vocabulary.check("start: x")
    assert compiled[4:] == ["start: x"]


@pytest.mark.parametrize("pattern", ["a{1000000}", "(a{1000}){1000}"])
def test_a_repetition_that_the_lexer_cannot_hold_is_refused_before_it_is_begun(vocabulary, pattern):
    """It compiles, and its first mask is made; the first token was an error of ours."""
    with pytest.raises(GrammarError, match="too many expressions"):
        vocabulary.check(regex(pattern))


def test_one_token_may_be_all_that_a_grammar_allows(vocabulary):
    for grammar in (choice(["a"]), regex(""), regex("a?")):
        vocabulary.check(grammar)


def test_what_takes_too_long_is_refused_from_then_on(monkeypatch, vocabulary):
    monkeypatch.setattr(grammar_vocabulary, "MOST_SECONDS", 0.0)
    for _ in range(2):
        with pytest.raises(GrammarError, match=r"takes 0\.\d s; at most 0 s"):
            vocabulary.check(regex("[a-z]+ too long"))


def test_a_matcher_is_at_the_beginning_whatever_others_took(vocabulary):
    one = vocabulary.compiled(choice(["ab", "cd"])).copy()
    assert one.consume_tokens(list(b""))
    first = allowed(vocabulary, choice(["ab", "cd"]), [])
    taken = vocabulary.compiled(choice(["ab", "cd"])).copy()
    taken.consume_token(min(first))
    assert allowed(vocabulary, choice(["ab", "cd"]), []) == first


def test_many_threads_may_ask_at_once():
    vocabulary, failed = tiny_tokenizer().grammar_vocabulary(1300), list[BaseException]()

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    def work() -> None:
        for i in range(20):
            grammar = regex(f"a{{1,{1 + i % 7}}}")
            vocabulary.check(grammar)
            assert vocabulary.compiled(grammar).copy().compute_bitmask()

    threads = [threading.Thread(target=run, args=(work,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def nested(schema: Any) -> Any:
    for _ in range(60):
        schema = {"items": schema}
    return schema


# The most that the sizes let through, by what grows fastest. What ends a process would end the tests.
LARGEST = {
    "properties": lambda: json_schema({"type": "object", "properties": {f"p{i}": {} for i in range(2490)}}),
    "references": lambda: json_schema(
        {
            "$ref": "#/$defs/0",
            "$defs": {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1240)} | {"1240": {}},
        }
    ),
    "intersections": lambda: json_schema({"allOf": [{"properties": {f"p{i}": {}}} for i in range(1200)]}),
    "options": lambda: json_schema({"anyOf": [{"required": [f"p{i}"]} for i in range(2490)]}),
    "choice": lambda: choice([f"a text {i}" for i in range(4096)]),
    "rules": lambda: "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(9000)) + 'r9000: "c"\n',
    "terminals": lambda: "start: R0\n" + "".join(f"R{i}: R{i + 1}\n" for i in range(9000)) + 'R9000: "c"\n',
    "nested references": lambda: json_schema(
        {"$ref": "#/$defs/0", "$defs": {str(i): nested({"$ref": f"#/$defs/{i + 1}"}) for i in range(40)} | {"40": {}}}
    ),
    "expression": lambda: regex("|".join(f"[a-z]{{1,20}}{i}[0-9]{{3,30}}" for i in range(4000))),
    "repetition": lambda: regex("(([a-z]{1,1000}x){1,1000}y){1,1000}"),
}


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_are_taken_or_refused_in_bounded_time(name):
    begin = time.process_time()
    try:
        grammar = LARGEST[name]()
        tiny_vocabulary().check(grammar)
        said = "taken"
    except GrammarError as error:
        said = str(error)
    seconds = time.process_time() - begin
    print(f"{name}: {seconds:.2f} s, {said[:100]}")
    assert seconds < 5.0


def test_a_tokenizer_that_names_no_end_has_no_grammars(backend):
    with pytest.raises(TokenizerError, match="eos_token"):
        Tokenizer(backend, special_tokens={}).grammar_vocabulary(300)


def test_an_error_of_the_compiler_itself_is_told_to_who_asked(
    vocabulary: GrammarVocabulary, monkeypatch: pytest.MonkeyPatch
):
    """It runs in a thread of its own, which would end with a word of Python's alone."""

    def broken(*_: Any, **options: Any) -> Any:
        raise MemoryError("no room for a stack")

    monkeypatch.setattr(grammar_vocabulary, "LLMatcher", broken)
    with pytest.raises(MemoryError, match="no room for a stack"):
        vocabulary.fresh_matcher('start: "a"')
