from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from isotherm.cluster.deploy import standing


def test_an_error_without_words_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def check() -> None:
        raise ConnectionError

    monkeypatch.setattr(standing, "PERIOD", 0.0)
    ends = iter([False, True])
    asyncio.run(standing.watch_standing(SimpleNamespace(check=check), lambda: next(ends)))  # type: ignore[arg-type]
    assert caplog.messages == ["cannot see whether there is a newer controller: ConnectionError"]
