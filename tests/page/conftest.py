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
from axe_playwright_python.sync_playwright import Axe
from fake_cluster import FakeCluster
from fake_engine import FakeEngine, http_server, write_tokenizer
from playwright.sync_api import Browser, Page, sync_playwright

from isotherm.cluster.api.app import build_app
from isotherm.cluster.text.tokenizer import Tokenizer

DESKTOP, PHONE = (1360, 860), (390, 844)
VIEWS = ("chat", "cluster", "operate", "requests")
SHOTS = os.environ.get("ISOTHERM_SCREENSHOTS")  # a folder that gets pictures


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


class Window:
    """Opens pages. What they write to the console as an error, and what no script has caught, is kept in `errors`."""

    def __init__(self, browser: Browser) -> None:
        self._browser, self._contexts = browser, []  # type: ignore[var-annotated]
        self.errors: list[str] = []
        self.expected: tuple[str, ...] = ()  # parts of errors that a test provokes

    def open(self, url: str, view: str = "chat", size: tuple[int, int] = DESKTOP, theme: str = "light") -> Page:
        context = self._browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=theme,  # type: ignore[arg-type]
            reduced_motion="reduce",
        )
        context.set_default_timeout(30_000)
        self._contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda shown: (self.errors.append(f"a dialog: {shown.message}"), shown.dismiss()))
        page.goto(f"{url}/#{view}")
        page.locator("main h1").wait_for()
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        assert not [e for e in self.errors if not any(part in e for part in self.expected)]


@pytest.fixture
def window(browser: Browser) -> Iterator[Window]:
    opened = Window(browser)
    yield opened
    opened.close()


class StandIn:
    """What is behind a server without a model: an engine that says what it is told, and a cluster without workers."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.tokenizer = Tokenizer.load(write_tokenizer(folder))
        self.engine = FakeEngine(self.tokenizer.vocab_size, max_model_len=4096, delay_s=0.002, per_delta=3)
        self.model = options.get("model", "tiny")
        self.cluster = FakeCluster(**options)
        self.says("Hello.")

    def says(self, text: str) -> None:
        self.engine.script = [*self.tokenizer.encode(text), 1]

    def app(self) -> Any:
        return build_app(self.engine, self.tokenizer, self.model, admin=self.cluster)


Serves = Callable[..., Any]


@pytest.fixture
def serves(tmp_path: Path) -> Serves:
    """Serves a stand-in: a context manager that gives it and its address."""

    @contextmanager
    def serve(**options: Any) -> Iterator[tuple[StandIn, str]]:
        stand_in = StandIn(tmp_path, **options)
        with http_server(stand_in.app()) as url:
            yield stand_in, url

    return serve


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def shot(page: Page, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(600)  # until colours and lines have settled
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def violations(page: Page) -> list[str]:
    """What axe-core finds against WCAG 2.2 AA."""
    options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
    found = Axe().run(page, options=options).response["violations"]
    return [
        f"{one['id']}: {node['html'][:160]} {node['failureSummary'][:300]}" for one in found for node in one["nodes"]
    ]
