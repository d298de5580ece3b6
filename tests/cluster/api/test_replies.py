from __future__ import annotations

import pytest

from isotherm.cluster.api import replies
from isotherm.cluster.api.replies import sse, to_json, to_json_by_parts

VALUE = {
    "id": "a\u2028b\x85",
    "n": None,
    "empty": [{}, [], ""],
    "choices": [
        {"logprobs": {"tokens": ["é", "\u2029"], "top": [{"a": -0.5, "b": [1, [2, {"c": True}]]}, None]}, "index": i}
        for i in range(3)
    ],
}


@pytest.mark.parametrize("entries", [1, 2, 3, 128])
def test_json_by_parts_is_the_same_json(monkeypatch, entries):
    monkeypatch.setattr(replies, "_ENTRIES", entries)
    for value in (VALUE, [VALUE] * 4, [[]] * 7, [], {}, "x", 7, None):
        assert to_json_by_parts(value) == to_json(value)
    assert sse(VALUE, "e", by_parts=True) == sse(VALUE, "e")
