from __future__ import annotations

import pytest

from isotherm.cluster.text.output import OutputFields
from isotherm.cluster.text.output_parsers import OUTPUT_PARSERS, make_parser


@pytest.mark.parametrize("name", sorted(OUTPUT_PARSERS))
def test_every_parser_leaves_text_without_tags_alone(name):
    parser = make_parser(name, "<User>hi<Assistant>")
    assert parser.feed("Hello") == OutputFields("Hello") and parser.finish() == OutputFields()
    assert not parser.is_reasoning


def test_the_plain_one_reads_no_tags():
    parser = make_parser("plain", "<think>")
    assert parser.feed("<think>a</think>b") == OutputFields("<think>a</think>b") and not parser.tags


def test_an_unknown_name_is_told_with_those_that_there_are():
    with pytest.raises(ValueError, match="no output parser 'thnik'; there are plain, think"):
        make_parser("thnik")
