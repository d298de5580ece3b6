"""Tokens that tokenizer_config.json adds to tokenizer.json's, or flags otherwise."""

from __future__ import annotations

import pytest
from fake_engine import BOS, EOS, write_tokenizer
from tokenizers import Tokenizer as Backend

from isotherm.cluster.text.tokenizer import Tokenizer
from isotherm.cluster.text.tokenizer_files import TokenizerError

CALL = {"content": "<|call|>", "special": True}
ADDED = [
    {"content": "<think>", "special": True}, CALL,
    {"content": "<|end|>", "special": False, "normalized": False, "rstrip": True},
]  # fmt: skip


def test_added_tokens_of_the_config_are_those_of_transformers(tmp_path):
    """A fine-tune's: tokens that tokenizer.json lacks, and one that it does not flag as special."""
    import transformers  # without it there would be no oracle: no reason to skip

    first = Backend.from_file(str(write_tokenizer(tmp_path) / "tokenizer.json")).token_to_id("<think>")
    named = {str(first + i): entry for i, entry in enumerate(ADDED)}
    named["0"] = {"content": BOS, "special": False}
    write_tokenizer(tmp_path, tokenizer_class="PreTrainedTokenizerFast", added_tokens_decoder=named, add_bos_token=None)
    oracle, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    text = f"hello <|call|> world <think>thought</think><|end|> x{EOS}"
    ids = ours.encode(text)
    assert ids == oracle.encode(text) and {first, first + 1, first + 2} <= set(ids)
    assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert {first, first + 1} <= ours.special_ids and first + 2 not in ours.special_ids
    assert ours.control_tokens["<|call|>"] == first + 1


def test_the_templates_marker_is_a_token_where_the_config_alone_names_it(tmp_path):
    size = Backend.from_file(str(write_tokenizer(tmp_path) / "tokenizer.json")).get_vocab_size()
    template = "<|call|>{{ messages[0].content }}"
    write_tokenizer(tmp_path, added_tokens_decoder={str(size): CALL}, chat_template=template)
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode_chat([{"role": "user", "content": "<|call|>"}]).ids
    tokenizer.chat_template.close()
    assert ids[0] == size and size not in ids[1:] and tokenizer.decode(ids, skip_special_tokens=False) == "<|call|>" * 2


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"x": CALL}, "must be an object of ids and tokens"),
        ({"9": "<|call|>"}, "must be an object of ids and tokens"),
        ({"9": {"special": True}}, "must be an object of ids and tokens"),
        ([CALL], "must be an object of ids and tokens"),
    ],
)
def test_added_tokens_that_cannot_be_are_refused(tmp_path, named, message):
    write_tokenizer(tmp_path, added_tokens_decoder=named)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: added_tokens_decoder ") as caught:
        Tokenizer.load(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"9999": CALL}, "says that '<|call|>' is 9999; with tokenizer.json it is 3"),
        ({"7": {"content": BOS}}, f"says that {BOS!r} is 7; with tokenizer.json it is 0"),
    ],
)
def test_one_that_would_get_another_id_is_left_out_with_a_warning(tmp_path, caplog, named, message):
    """A stale field beside a newer tokenizer.json."""
    write_tokenizer(tmp_path)
    before = Tokenizer.load(tmp_path).encode("<|call|> hi")
    write_tokenizer(tmp_path, added_tokens_decoder=named)
    assert Tokenizer.load(tmp_path).encode("<|call|> hi") == before
    assert message in caplog.text


def test_an_end_that_is_no_token_is_warned_of(tmp_path, caplog):
    write_tokenizer(tmp_path, eos_token="<|nowhere|>").joinpath("config.json").write_text('{"eos_token_id": 1}')
    assert Tokenizer.load(tmp_path).eos_token_ids == {1}
    (record,) = caplog.records
    assert "its eos_token '<|nowhere|>' is no token of the vocabulary, and so ends no text" in record.getMessage()
