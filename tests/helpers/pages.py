"""A page in a headless Chromium, what serves it, and what is looked for in every one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from fake_cluster import FakeCluster
from fake_engine import FakeEngine, write_tokenizer
from playwright.sync_api import Browser, Page, expect
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isotherm.cluster.api.app import build_app
from isotherm.cluster.text.tokenizer import Tokenizer

DESKTOP, PHONE = (1360, 860), (390, 844)
VIEWS = ("chat", "cluster", "operate", "requests")
SHOTS = os.environ.get("ISOTHERM_SCREENSHOTS")  # a folder that gets pictures
expect.set_options(timeout=30_000)  # a busy machine is no failure


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
        """Before the server ends, whose end is an error to a page."""
        while self._contexts:
            self._contexts.pop().close()

    def check(self) -> None:
        assert not [e for e in self.errors if not any(part in e for part in self.expected)]


class StandIn:
    """What is behind a server without a model: an engine that says what it is told, and a cluster without workers."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.tokenizer = Tokenizer.load(write_tokenizer(folder))
        self.engine = FakeEngine(self.tokenizer.vocab_size, max_model_len=4096, delay_s=0.002, per_delta=3)
        self.model = options.get("model", "tiny")
        self.cluster = FakeCluster(**options)
        self.ended = False
        self.records = [_record(i) for i in range(24)]
        self.says("Hello.")

    def says(self, text: str) -> None:
        self.engine.script = [*self.tokenizer.encode(text), 1]

    def app(self) -> Any:
        app = build_app(
            self.engine,
            self.tokenizer,
            self.model,
            admin=self.cluster,
            ends=lambda: self.ended,  # type: ignore[arg-type]
        )
        app.router.routes.insert(0, Route("/admin/requests", self._book))
        return app

    async def _book(self, request: Request) -> Response:
        return JSONResponse({"running": self.records[:1], "recent": self.records[1:]})


def _record(number: int) -> dict[str, Any]:
    """Of a request: one that runs, then others that have ended."""
    queue, prefill, decode = 0.004 * (number % 5), 0.02 + 0.013 * (number % 7), 0.3 + 0.21 * (number % 9)
    seconds = 0.002 + queue + prefill + decode
    times = {"prepare": 0.002, "queue": queue, "prefill": prefill, "decode": decode, "seconds": seconds}
    return {
        **times, "first_token": seconds - decode, "started": time.time() - 3 - 11 * number,
        "id": f"{number * 7919:032x}",
        "reply": f"chatcmpl-{number}", "key": ["", "team-a", "batch"][number % 3], "route": "/v1/chat/completions",
        "model": "tiny", "state": "ended" if number else "generating", "status": 200, "stream": True, "choices": 1,
        "error": "overloaded" if number == 4 else "", "finish_reasons": ["stop"] if number else [],
        "prompt_tokens": 210 + 37 * number, "cached_tokens": 64 * (number % 3),
        "output_tokens": 40 + 23 * (number % 9),
        "moved": int(number == 3), "resumed": 0, "preempted": 0, "group_wait": 0.01, "chunks": [], "moves": [],
    }  # fmt: skip


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
