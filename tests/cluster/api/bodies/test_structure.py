from __future__ import annotations

import json

import pytest

from isotherm.cluster.api.bodies.structure import StructuredBody, may_be_structured


@pytest.mark.parametrize("name", sorted(StructuredBody.model_fields))
def test_a_field_is_seen_however_its_name_is_written(name):
    assert may_be_structured(json.dumps({"model": "m", name: "a+"}).encode())
    for i, char in enumerate(name):
        for code in (f"\\u{ord(char):04x}", f"\\u{ord(char):04X}"):
            raw = f'{{"{name[:i]}{code}{name[i + 1 :]}": "a+"}}'
            assert json.loads(raw) == {name: "a+"} and may_be_structured(raw.encode())
    escaped = "".join(f"\\u{ord(char):04x}" for char in name)
    assert may_be_structured(f'{{"{escaped}": "a+"}}'.encode())


def test_a_body_of_other_fields_is_not():
    body = {
        "model": "m",
        "prompt": 'Zürich 東京 😀\n, a "grammar" or a regex',
        "max_tokens": 5,
        "stop": ["x"],
        "stream": True,
    }
    assert not may_be_structured(json.dumps(body).encode())
    assert not may_be_structured(json.dumps(body, ensure_ascii=False).encode())
