from __future__ import annotations

from isotherm.cluster.text.output import OutputFields, ToolCallPiece, joined


def test_pieces_are_joined_by_field_and_calls_by_index():
    pieces = [
        OutputFields("a", "x"),
        OutputFields(tool_calls=(ToolCallPiece(1, "id-1", "add", '{"a":'), ToolCallPiece(0, "id-0", "now"))),
        OutputFields("b", "y", (ToolCallPiece(1, arguments=" 1}"),)),
    ]
    calls = (ToolCallPiece(0, "id-0", "now"), ToolCallPiece(1, "id-1", "add", '{"a": 1}'))
    assert joined(pieces) == OutputFields("ab", "xy", calls)
    assert joined([]) == OutputFields() and OutputFields().is_empty
    assert not any(piece.is_empty for piece in (*pieces, OutputFields(reasoning=" ")))
