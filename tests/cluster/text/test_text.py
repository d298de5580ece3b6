from __future__ import annotations

import contextlib
import json
import time

import pytest
from fake_engine import BOS, EOS, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from isotherm.cluster.text.chat_template import (
    ChatTemplate,
    ChatTemplateBrokenError,
    ChatTemplateError,
    ChatTemplateLimitError,
)
from isotherm.cluster.text.detokenizer import TextStream
from isotherm.cluster.text.tokenizer import NoChatTemplateError, Tokenizer
from isotherm.cluster.text.tokenizer_files import TokenizerError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b> & 'é'"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    loaded = Tokenizer.load(directory)
    yield loaded
    loaded.chat_template.close()


def stream_text(tokenizer, ids, stop=(), chunk=1, **options):
    stream = tokenizer.stream(stop, **options)
    out, used = "", 0
    for at in range(0, len(ids), chunk):
        piece = stream.push(ids[at : at + chunk])
        assert "\ufffd" not in piece.text
        out, used = out + piece.text, used + piece.tokens
        if piece.stopped:
            return out, used, True
    return out + stream.flush(), used, False


def test_encode_decode_round_trip(tokenizer):
    text = "hello 日本語 😀 naïve <think> x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == [0, *ids]
    assert tokenizer.decode([0, *ids, 1]) == text
    assert tokenizer.decode([0, *ids, 1], skip_special_tokens=False) == BOS + text + EOS


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": False},
        {"add_bos_token": None},
        {"add_bos_token": True, "add_eos_token": True},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": None},
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False},
    ],
)
def test_special_tokens_as_transformers_adds_them(tmp_path, config):
    import transformers  # without it there would be no oracle: no reason to skip

    write_tokenizer(tmp_path, **config)
    cls = config.get("tokenizer_class", "LlamaTokenizerFast")
    # tokenizer.json read as it is, as AutoTokenizer does for DeepSeek checkpoints; the class matters for its default of
    # add_bos_token alone
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    defaults = {"add_bos_token": True} if cls == "LlamaTokenizerFast" else {}
    flags = {key: values[key] for key in ("add_bos_token", "add_eos_token") if key in values}
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=BOS, eos_token=EOS, **{**defaults, **flags}
    )
    ours = Tokenizer.load(tmp_path)
    for text in ("hello world", "日本 😀"):
        assert ours.encode(text) == oracle.encode(text)
        assert ours.encode(text, add_special_tokens=False) == oracle.encode(text, add_special_tokens=False)


def test_chat_prompt_equals_transformers(tokenizer, directory):
    import transformers  # without it there would be no oracle: no reason to skip

    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), bos_token=BOS, eos_token=EOS
    )
    oracle.chat_template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    tools = [{"type": "function", "function": {"name": "f<>"}}]
    for given_tools, kwargs in ((None, {}), (tools, {}), (None, {"thinking": True})):
        asked = {"tools": given_tools, "tokenize": False, "add_generation_prompt": True}
        expected = oracle.apply_chat_template(MESSAGES, **asked, **kwargs)
        assert tokenizer.encode_chat(MESSAGES, given_tools, template_kwargs=kwargs).text == expected
    assert tokenizer.encode_chat(MESSAGES).ids.count(0) == 1  # one BOS: the template's


def test_eos_ids_are_united(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert Tokenizer.load(tmp_path).eos_token_ids == {1, 5, 7, 9}
    (tmp_path / "config.json").write_text('{"eos_token_id": null, "text_config": {"eos_token_id": 11}}')
    assert Tokenizer.load(tmp_path).eos_token_ids == {1, 5, 7, 11}
    (tmp_path / "config.json").write_text('{"eos_token_id": "nine"}')
    with pytest.raises(TokenizerError, match=r"config\.json: eos_token_id"):
        Tokenizer.load(tmp_path)


def test_chat_template_sources(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write_tokenizer(tmp_path, chat_template=named)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.encode_chat(MESSAGES).text, tokenizer.encode_chat(MESSAGES, [{}]).text) == ("D", "T")
    tokenizer.chat_template.close()
    (tmp_path / "chat_template.jinja").write_text("J")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode_chat(MESSAGES).text == "J"
    tokenizer.chat_template.close()
    (tmp_path / "chat_template.jinja").unlink()
    write_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(NoChatTemplateError, match="completions"):
        Tokenizer.load(tmp_path).encode_chat(MESSAGES)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "S"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode_chat(MESSAGES).text == "S"
    tokenizer.chat_template.close()
    write_tokenizer(tmp_path, chat_template=[{"name": "x"}])
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template"):
        Tokenizer.load(tmp_path)


def test_load_errors_name_the_file(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not found"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    write_tokenizer(tmp_path, bos_token="<nope>")
    with pytest.raises(TokenizerError, match=r"bos_token '<nope>'"):
        Tokenizer.load(tmp_path)
    write_tokenizer(tmp_path)
    backend = Backend(models.WordLevel({"a": 0, BOS: 1}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="decoder"):
        Tokenizer.load(tmp_path)


def test_byte_fallback_tokenizer(tmp_path):
    vocab = {"<s>": 0, "▁a": 1, "b": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    ids = [2, 1, *(3 + byte for byte in "😀".encode())]
    assert tokenizer.decode(ids) == backend.decode(ids) == "b a😀"
    assert stream_text(tokenizer, ids)[0] == "b a😀"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stream_equals_decoding_at_once(tokenizer, directory, data):
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    for skip in (True, False):
        expected = backend.decode([id_ for id_ in ids if id_ < tokenizer.vocab_size], skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip) == expected
        stream = tokenizer.stream(skip_special_tokens=skip)
        chunk = data.draw(st.integers(1, 5))
        pieces = [stream.push(ids[at : at + chunk]) for at in range(0, len(ids), chunk)]
        assert "".join(piece.text for piece in pieces) + stream.flush() == expected


def test_half_a_character_is_held_back(tokenizer):
    ids = [id_ for id_ in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(id_)) == 1]
    by_byte = {tokenizer.token_bytes(id_)[0]: id_ for id_ in ids}
    stream = tokenizer.stream()
    smiley = [by_byte[byte] for byte in "😀".encode()]
    assert [stream.push([id_]).text for id_ in smiley] == ["", "", "", "😀"]
    assert stream.push(smiley[:2]).text == ""
    assert stream.flush() == "\ufffd"


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    chunk=st.integers(1, 4),
)
def test_stop_strings_like_a_naive_search(text, stops, chunk):
    to_bytes = {i: char.encode() for i, char in enumerate("abc")}
    ids = ["abc".index(char) for char in text]
    stream = TextStream(to_bytes.__getitem__, stops)
    out, used, stopped = "", 0, False
    for at in range(0, len(ids), chunk):
        piece = stream.push(ids[at : at + chunk])
        out, used, stopped = out + piece.text, used + piece.tokens, piece.stopped
        if stopped:
            break
    out += stream.flush()
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        assert (out, used, stopped) == (text, len(text), False)
    else:
        end, minus_length = min(ends)
        assert (out, used, stopped) == (text[: end + minus_length], end, True)


@given(
    pieces=st.lists(st.sampled_from(["a", "b", "é", "<s>", "<t>"]), max_size=14),
    stops=st.lists(
        st.sampled_from(["a", "ab", "<s>", "a<s>", "<s>b", "a<s>é", "<t><s>", "bé"]), max_size=4, unique=True
    ),
    include=st.booleans(),
    chunk=st.integers(1, 4),
)
def test_stop_strings_that_spell_special_tokens_see_them(pieces, stops, include, chunk):
    """Like a naive search through the text with special tokens; the other stop strings search the text without."""
    names = ["a", "b", "é", "<s>", "<t>"]
    special = {3: "<s>", 4: "<t>"}
    spelled = [stop for stop in stops if "<" in stop]
    stream = TextStream(
        lambda id_: b"" if id_ in special else names[id_].encode(), stops,
        include_stop=include, spelled=spelled, hidden_text=lambda id_: special.get(id_, ""),
    )  # fmt: skip
    out, used, stopped, ids = "", 0, False, [names.index(piece) for piece in pieces]
    for at in range(0, len(ids), chunk):
        piece = stream.push(ids[at : at + chunk])
        out, used, stopped = out + piece.text, used + piece.tokens, piece.stopped
        if stopped:
            break
    out += stream.flush()
    for end in range(1, len(pieces) + 1):
        shown = "".join(piece for piece in pieces[:end] if "<" not in piece)
        whole = "".join(pieces[:end])
        last_is_shown = "<" not in pieces[end - 1]
        found = [stop for stop in spelled if whole.endswith(stop)]
        found += [stop for stop in stops if stop not in spelled and last_is_shown and shown.endswith(stop)]
        if found:
            without = max(len(stop.replace("<s>", "").replace("<t>", "")) for stop in found)
            assert (out, used, stopped) == (shown if include else shown[: len(shown) - without], end, True)
            return
    assert (out, used, stopped) == ("".join(piece for piece in pieces if "<" not in piece), len(pieces), False)


@pytest.mark.parametrize("stop", [EOS, f"b{EOS}", f"{EOS}c"])
def test_the_text_of_a_special_token_stops_though_it_is_not_shown(tokenizer, stop):
    ids = tokenizer.encode(f"ab{EOS}cd", add_special_tokens=False)
    text, used, stopped = stream_text(tokenizer, ids, [stop])
    assert stopped and text == {EOS: "ab", f"b{EOS}": "a", f"{EOS}c": "ab"}[stop] and used < len(ids)
    shown, _, stopped = stream_text(tokenizer, ids, [stop], skip_special_tokens=False)
    assert stopped and shown == text
    included, *_ = stream_text(tokenizer, ids, [stop], include_stop=True)
    assert included == "abc" if stop.endswith("c") else included == "ab"
    included, *_ = stream_text(tokenizer, ids, [stop], include_stop=True, skip_special_tokens=False)
    assert included == f"ab{EOS}c" if stop.endswith("c") else included == f"ab{EOS}"


def test_a_stop_string_is_part_of_the_text_where_that_is_asked_for(tokenizer):
    ids = tokenizer.encode("hello world, lazy dog", add_special_tokens=False)
    for chunk in (1, 3, 50):
        assert stream_text(tokenizer, ids, ["ld, l"], chunk, include_stop=True)[0] == "hello world, l"


def test_a_prompt_has_one_bos(tokenizer):
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode_prompt("hello") == tokenizer.encode_prompt(f"{BOS}hello") == [0, *ids]
    assert tokenizer.encode_prompt(f"{BOS}{BOS}hello") == [0, 0, *ids]  # what is written twice stays
    assert tokenizer.encode_prompt("hello", add_special_tokens=False) == ids
    assert tokenizer.encode_prompt(f"{BOS}hello", add_special_tokens=False) == [0, *ids]
    assert tokenizer.encode_prompt(BOS) == [0]


def test_a_bos_is_kept_where_the_tokenizer_adds_none(tmp_path):
    plain = Tokenizer.load(write_tokenizer(tmp_path, add_bos_token=False, chat_template=None))
    assert plain.encode_prompt(f"{BOS}{BOS}a")[:2] == [0, 0] and plain.encode_prompt(f"{BOS}a")[0] == 0


def test_stop_string_over_tokens(tokenizer):
    ids = tokenizer.encode("hello world, lazy dog", add_special_tokens=False)
    text, used, stopped = stream_text(tokenizer, ids, ["ld, l"])
    assert (text, stopped) == ("hello wor", True)
    assert tokenizer.decode(ids[:used]).startswith("hello world, l") and not tokenizer.decode(
        ids[: used - 1]
    ).startswith("hello world, l")
    stream = tokenizer.stream(["hello"])
    assert stream.push(ids).stopped
    with pytest.raises(ValueError, match="after a stop string"):
        stream.push(ids)
    with pytest.raises(ValueError, match="empty"):
        tokenizer.stream([""])


def test_detokenising_is_linear(tokenizer):
    broken = next(id_ for id_ in range(tokenizer.vocab_size) if tokenizer.token_bytes(id_) == b"\x80")

    def seconds(count):
        stream = tokenizer.stream(["x" * 500, "y"])
        begin = time.thread_time()
        for _ in range(count):
            stream.push([broken])
        return time.thread_time() - begin

    seconds(1000)
    assert seconds(40_000) < 30 * seconds(4_000)  # quadratic would be 100


HOSTILE = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set x = namespace(v='a') %}{% for i in range(100) %}{% set x.v = x.v ~ x.v %}{% endfor %}{{ x.v }}",
    "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_template_ends_in_time_and_the_next_render_works(source):
    template = ChatTemplate(
        {"default": "{% if bad %}" + source + "{% else %}fine{% endif %}"}, time_limit=0.4, memory_limit=256 << 20
    )
    begin = time.monotonic()
    with pytest.raises(ChatTemplateError):
        template.render({"messages": [], "bad": True})
    assert time.monotonic() - begin < 5
    # constant folding may have made the whole template impossible; it is refused then, and never hangs
    with contextlib.suppress(ChatTemplateLimitError):
        assert template.render({"messages": [], "bad": False}).text == "fine"
    template.close()


def test_template_errors():
    with pytest.raises(ChatTemplateBrokenError, match="does not compile"):
        ChatTemplate({"default": "{% if %}"}).render({})
    with pytest.raises(ChatTemplateError, match=r"^roles must alternate$"):
        ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}).render({})
    with pytest.raises(ChatTemplateBrokenError, match="none named 'default'"):
        ChatTemplate({"other": "x"}).render({})
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(ChatTemplateLimitError, match="nested"):
        ChatTemplate({"default": "x"}).render({"messages": nested})


def test_template_child_ends_with_its_owner():
    source = (
        "{% generation %}x{% endgeneration %}{% for i in [1, 2] %}{{ i }}{% break %}{% endfor %}"
        "{{ strftime_now('%%') }}"
    )
    template = ChatTemplate({"default": source})
    assert template.render({}).text == "x1%"
    child = template._child
    assert child is not None and child.poll() is None
    child.stdin.close()  # what the kernel does when the owner dies
    assert child.wait(5) == 0
    assert template.render({}).text == "x1%"
    template.close()
    assert template._child is None


@pytest.mark.parametrize(("least", "text"), [(0, ""), (1, "ab"), (2, "abab"), (4, "abababab")])
def test_stop_strings_do_not_count_in_the_first_tokens(least, text):
    stream = TextStream(lambda token: b"ab", ["ab"], least)
    pieces = [stream.push([0]) for _ in range(min(least + 1, 4))]
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.stopped for piece in pieces] == [i >= least for i in range(len(pieces))]


def test_template_child_ends_with_a_template_that_is_forgotten():
    template = ChatTemplate({"default": "x"})
    assert template.render({}).text == "x"
    child = template._child
    assert child is not None
    del template
    assert child.returncode is not None and child.stdout.closed
