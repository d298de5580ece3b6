"""A headless Chromium of the system, and pages of it that fail a test where they write an error to the console.

`make test-page` runs these. They need Debian's package chromium, or another one that ISOTHERM_CHROMIUM names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_engine import http_server
from pages import StandIn, Window
from playwright.sync_api import Browser, sync_playwright


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("ISOTHERM_CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.fail("there is no Chromium: apt-get install chromium, or name one in ISOTHERM_CHROMIUM")
    # As root its sandbox cannot be; what it shows is our own server's.
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield started
        started.close()


@pytest.fixture
def window(browser: Browser) -> Iterator[Window]:
    opened = Window(browser)
    yield opened
    opened.close()
    opened.check()


Serves = Callable[..., Any]


@pytest.fixture
def serves(tmp_path: Path, window: Window) -> Serves:
    """Serves a stand-in: a context manager that gives it and its address."""

    @contextmanager
    def serve(**options: Any) -> Iterator[tuple[StandIn, str]]:
        stand_in = StandIn(tmp_path, **options)
        with http_server(stand_in.app()) as url:
            try:
                yield stand_in, url
            finally:
                stand_in.ended = True
                window.close()

    return serve
