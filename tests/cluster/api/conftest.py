"""What tests of the front door stand on: a small tokenizer, and an engine without a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine, write_tokenizer

from isotherm.cluster.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    loaded = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    yield loaded
    assert loaded.chat_template is not None
    loaded.chat_template.close()


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer.vocab_size)
