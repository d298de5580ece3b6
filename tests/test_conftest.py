"""What holds for every test: modules run in a random order that can be repeated, and whatever is skipped says why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def conftest(pytestconfig: pytest.Config) -> Any:
    """The one beside this file, as pytest has loaded it."""
    return pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


MODULES = [f"tests/test_{letter}.py" for letter in "abcdefgh"]
IN_FILES = [f"{module}::test_{number}" for module in MODULES for number in range(3)]


def ordered(conftest: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(conftest, "ORDER_SEED", seed)
    items = [SimpleNamespace(nodeid=nodeid) for nodeid in IN_FILES]
    conftest.pytest_collection_modifyitems(items)
    return [item.nodeid for item in items]


def test_modules_are_shuffled_and_each_keeps_its_own_order(conftest: Any, monkeypatch: pytest.MonkeyPatch):
    orders = [ordered(conftest, seed, monkeypatch) for seed in range(20)]
    for order in orders:
        assert sorted(order) == IN_FILES
        modules = [nodeid.split("::")[0] for nodeid in order[::3]]
        assert order == [f"{module}::test_{number}" for module in modules for number in range(3)]
    assert len({tuple(order) for order in orders}) == 20 and IN_FILES not in orders


def test_a_seed_repeats_its_order(conftest: Any, monkeypatch: pytest.MonkeyPatch):
    """Also in the processes of pytest-xdist, which all have to collect the same."""
    assert ordered(conftest, 7, monkeypatch) == ordered(conftest, 7, monkeypatch)
    assert conftest.pytest_report_header().endswith(f"ISOTHERM_ORDER_SEED={conftest.ORDER_SEED}")


def test_a_skip_says_why(pytestconfig: pytest.Config):
    assert "-rs" in pytestconfig.getini("addopts")
