"""Every view, in both themes and two sizes: what axe-core has to say of it, and that nothing is wider than the page."""

from __future__ import annotations

import pytest
from pages import DESKTOP, PHONE, VIEWS, ask, shot, violations
from playwright.sync_api import expect

SAID = """<think>A table, and code.</think>Here is **what you asked for**, with a [link](https://example.com).

| layer | heat |
|---|--:|
| 1 | 2.4 |
| 2 | 0.7 |

```python
def heat(rows, mean):
    return rows / mean
```

> It was a warm day.
"""


@pytest.mark.parametrize(("theme", "size"), [("light", DESKTOP), ("dark", DESKTOP), ("light", PHONE), ("dark", PHONE)])
def test_every_view(window, serves, theme, size):
    with serves() as (stand_in, url):
        stand_in.says(SAID)
        page = window.open(url, "chat", size, theme)
        name = f"{'phone' if size == PHONE else 'desktop'}-{theme}"
        assert violations(page) == []
        ask(page, "Show me the heat of the experts.")
        expect(page.locator(".said.model footer .facts")).to_contain_text("tokens")
        assert violations(page) == []
        shot(page, f"chat-{name}")
        page.get_by_role("button", name="Settings", exact=True).click()
        assert violations(page) == []
        for view in VIEWS[1:]:
            page.goto(f"{url}/#{view}")
            page.locator("main h1").wait_for()
            if view == "cluster":
                page.locator(".worker.expert").first.wait_for()
            page.wait_for_timeout(300)
            assert violations(page) == [], view
            wide = page.evaluate(
                "document.querySelector('main').scrollWidth - document.querySelector('main').clientWidth"
            )
            assert wide <= 0, view
            shot(page, f"{view}-{name}")
        if size == DESKTOP:
            page.goto(f"{url}/#cluster")
            page.locator("canvas").click(position={"x": 300, "y": 30})
            page.get_by_role("dialog").wait_for()
            assert violations(page) == []


def test_with_the_keyboard_alone(window, serves):
    with serves() as (_, url):
        page = window.open(url, "cluster")
        canvas = page.locator("canvas")
        page.locator(".worker.expert").first.wait_for()
        canvas.focus()
        for key in ("Home", "ArrowDown", "ArrowRight"):
            page.keyboard.press(key)
        expect(page.locator("#heat-said")).to_contain_text("expert 1:")
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("expert 1")
        more = dialog.get_by_role("button", name="Copies: one more")
        more.focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        expect(dialog.locator("output")).to_have_text("2")
        page.keyboard.press("Escape")
        expect(dialog).to_have_count(0)
