"""A served bundled model, for software of others that knows nothing of it (tests/clients/run.py starts it)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def url() -> str:
    """The base URL of OpenAI's API."""
    return os.environ["ISOTHERM_URL"]


@pytest.fixture(scope="session")
def tiny() -> Path:
    return Path(__file__).resolve().parents[2] / "manifests" / "tiny"
