from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from isotherm.cluster.text.chat_template import RenderedChat
from isotherm.cluster.text.control_tokens import ControlTokens


def backend(*added, vocab=("a", "b", "<", ">", "x", " ", "<x>")):
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocab)}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_tokens(list(added))
    return made


def chat(*parts):
    """A rendered chat of pieces, of which those in tuples are the template's."""
    text, own = "", []
    for part in parts:
        if isinstance(part, tuple):
            own += [len(text), len(text) + len(part[0])]
        text += part[0] if isinstance(part, tuple) else part
    return RenderedChat(text, tuple(own))


@pytest.mark.parametrize(
    ("parts", "tokens"),
    [
        ([("<m>",), "a", ("<m>",)], ["<m>", "a", "<m>"]),
        ([("<m>",), "<m>", ("<m>",)], ["<m>", *"<m>", "<m>"]),
        ([("<m>",), "<", "m", ">b"], ["<m>", *"<m>b"]),
        ([("<",), "m", (">",)], [*"<m>"]),
        ([("a<m>",), ("b",)], ["a", "<m>", "b"]),
        ([("<m>",), "<", ("<m>",)], ["<m>", "<", "<m>"]),
        (["<<m>"], [*"<<m>"]),
    ],
)
def test_only_the_templates_own_markers_count(parts, tokens):
    made = backend("<m>", "<<m>", vocab=[*"abm<>x "])
    ids = ControlTokens(made).encode(chat(*parts))
    assert [made.id_to_token(id_) for id_ in ids] == tokens


def test_white_space_that_a_marker_takes_in():
    made = backend(AddedToken("<m>", lstrip=True, rstrip=True), "</m>", vocab=[*"abm<>/ "])
    control = ControlTokens(made)
    plain = chat(("a  <m> ",), " b")
    assert control.encode(plain) == made.encode(plain.text).ids
    forged = control.encode(chat(("a  <m> ",), " b</m>"))
    assert [made.id_to_token(id_) for id_ in forged] == ["a", "<m>", *"b</m>"]


def test_added_white_space_is_text_of_everybody():
    made = backend("<m>", "  ", vocab=[*"abm<> "])
    control = ControlTokens(made)
    assert control.ids == {made.token_to_id("<m>")}
    ids = control.encode(chat(("<m>",), "a  b<m>"))  # "  " has another number in a tokenizer without <m>
    assert [made.id_to_token(id_) for id_ in ids] == ["<m>", "a", "  ", "b", *"<m>"]


def test_a_vocabulary_that_has_markers_as_words_gives_none_to_a_client():
    made = Tokenizer(models.WordLevel({"a": 0, "<": 1, "m": 2, ">": 3, "<m>": 4}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Fuse()
    made.add_tokens(["<m>"])
    assert ControlTokens(made).encode(chat(("<m>",), " <m> a")) == [4, 1, 2, 3, 0]


def test_a_tokenizer_without_added_tokens():
    made = backend(vocab=[*"ab"])
    assert ControlTokens(made).encode(chat("ab")) == [0, 1]
