from __future__ import annotations

import re
from pathlib import Path

import pytest

from isotherm.cluster.cli.printable import printable

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tä 日本 🙂", "two\nlines\tä 日本 🙂"),
        ("\x1b]52;c;x\x07", "\ufffd]52;c;x\ufffd"),
        ("two\r\nlines", "two\nlines"),
        ("over\rwritten\x08\x00\x7f\x9b", "over\ufffdwritten" + 4 * "\ufffd"),
    ],
)
def test_a_terminal_gets_no_orders(text: str, shown: str):
    assert printable(text, True) == shown and printable(text, False) == text


def test_no_console_makes_pictures_of_what_stands_between_colons():
    """`a[1:x:2]` became a[1❌2]: rich does so wherever it is not told otherwise."""
    files = [*(ROOT / "cluster").rglob("*.py")]
    made = [call for file in files for call in re.findall(r"\bConsole\(.*", file.read_text(encoding="utf-8"))]
    assert len(made) >= 8 and [call for call in made if "emoji=False" not in call] == []
