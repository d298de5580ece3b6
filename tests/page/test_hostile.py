"""Hostile text in every place that shows one: it is text, and nothing comes of it."""

from __future__ import annotations

import json

import pytest
from pages import VIEWS, ask
from playwright.sync_api import Page, expect

BAD = '<img src=x onerror="alert(1)"><script>alert(2)</script>"\'><svg onload=alert(3)>'
SAID = f"""{BAD}

# {BAD}

[{BAD}](javascript:alert(4)) [site](https://example.com/{"a" * 30}) ![{BAD}](data:text/html,x) <a href=x>y</a>

| {BAD} |
|---|
| {BAD} |

```{BAD}
{BAD}
```

> {BAD}

- {BAD}
"""


def clean(page: Page) -> None:
    """No element of the text has come to be, and nothing was asked for elsewhere."""
    made = page.evaluate(
        "[...document.querySelectorAll('img, script:not([src]), iframe, object, embed, a[href^=javascript], [onerror],"
        " [onload], style, form[action]')].map((node) => node.outerHTML)"
    )
    assert made == []


def test_what_a_model_writes(window, serves):
    with serves() as (stand_in, url):
        stand_in.says(SAID)
        page = window.open(url)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        ask(page, BAD)
        expect(page.locator(".said.model footer .facts")).to_contain_text("tokens")
        expect(page.locator(".said.user .words")).to_have_text(BAD)
        expect(page.locator(".talk-title")).to_contain_text("<img src=x")
        clean(page)
        assert all(one.startswith(url) for one in asked)
        expect(page.locator(".said.model button.link")).to_have_count(1)
        page.locator(".said.model button.link").click()
        expect(page.get_by_role("dialog").locator(".address")).to_have_text(f"https://example.com/{'a' * 30}")
        page.keyboard.press("Escape")
        page.reload()
        expect(page.locator(".past-title")).to_contain_text("<img src=x")
        clean(page)


def test_names_reasons_and_errors(window, serves):
    window.expected = ("400 (Bad Request)",)
    with serves(model=BAD, hostile=BAD) as (stand_in, url):
        stand_in.cluster.shards[0] = f"attention-{BAD}"
        stand_in.cluster.dead[f"attention-{BAD}"] = BAD
        stand_in.cluster.groups.append(f"expert-{BAD}")
        page = window.open(url, "cluster")
        expect(page.locator(".notice")).to_contain_text("<svg onload=alert(3)>")
        expect(page.locator(".worker.lost h4")).to_have_text(f"attention-{BAD}")
        expect(page.locator(".decisions")).to_contain_text("<script>alert(2)</script>")
        for view in VIEWS:
            page.goto(f"{url}/#{view}")
            page.locator("main h1").wait_for()
            clean(page)
        page.goto(f"{url}/#operate")
        panel = page.get_by_role("region", name="Scale", exact=True)
        panel.get_by_role("button", name="Expert groups: one more").click()
        panel.get_by_role("button", name="Show the plan").click()
        expect(panel.get_by_role("alert")).to_contain_text(BAD)
        expect(page.locator(".served")).to_have_text(BAD)
        clean(page)


def sse(*chunks: dict) -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def call_of(name: str, arguments: str) -> str:
    delta = {"tool_calls": [{"index": 0, "id": BAD, "function": {"name": name, "arguments": arguments}}]}
    return sse({"choices": [{"index": 0, "delta": delta}]}, {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})


@pytest.mark.parametrize("arguments", [json.dumps({"x": BAD}), BAD])
def test_tool_calls_and_their_results(window, serves, arguments):
    with serves() as (_, url):
        page = window.open(url)
        page.route("**/v1/chat/completions", lambda route: route.fulfill(
            body=call_of(BAD, arguments), headers={"content-type": "text/event-stream"}))  # fmt: skip
        ask(page, "Call it.")
        expect(page.locator(".call h3 code")).to_have_text(BAD)
        expect(page.locator(".call pre")).to_contain_text("onerror")
        page.get_by_label("Result of the call").fill(BAD)
        page.get_by_role("button", name="Give the results").click()
        expect(page.locator(".said.tool .words")).to_have_text(BAD)
        expect(page.locator(".call")).to_have_count(2)
        clean(page)


def test_the_book_of_requests(window, serves):
    text = {name: BAD for name in ("id", "reply", "key", "route", "model", "error")}
    times = dict.fromkeys(("prepare", "queue", "prefill", "decode", "first_token", "seconds"), 0.5)
    counts = dict.fromkeys(("status", "choices", "prompt_tokens", "cached_tokens", "output_tokens", "moved"), 2)
    record = {**text, **times, **counts, "state": "ended", "started": 1.0, "finish_reasons": [BAD], "moves": [[1, BAD]]}
    with serves() as (_, url):
        page = window.open(url)
        page.route("**/admin/requests", lambda route: route.fulfill(json={"running": [], "recent": [record]}))
        page.goto(f"{url}/#requests")
        expect(page.locator(".requests .result")).to_have_text(BAD)
        page.locator(".requests .link").click()
        expect(page.get_by_role("dialog")).to_contain_text("<script>alert(2)</script>")
        clean(page)


def test_a_key_is_asked_for_and_kept_only_where_that_is_asked(window, serves):
    window.expected = ("401 (Unauthorized)",)
    with serves() as (_, url):
        page = window.open(url)
        keys: list[str | None] = []

        def guard(route) -> None:
            keys.append(route.request.headers.get("authorization"))
            if keys[-1] == "Bearer right":
                route.continue_()
            else:
                route.fulfill(status=401, json={"error": {"message": f"a key, please {BAD}"}})

        for path in ("**/v1/**", "**/admin/**"):
            page.route(path, guard)
        page.reload()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("a key, please <img")
        clean(page)
        dialog.get_by_label("API key").fill("right")
        dialog.get_by_role("button", name="Use it").click()
        expect(page.locator(".served")).to_have_text("tiny")
        assert (
            page.evaluate("[...Object.values(sessionStorage), ...Object.values(localStorage)].join()").count("right")
            == 0
        )
        page.reload()
        dialog.get_by_label("API key").fill("right")
        dialog.get_by_label("Keep it in this tab").check()
        dialog.get_by_role("button", name="Use it").click()
        expect(page.locator(".served")).to_have_text("tiny")
        page.reload()
        expect(page.locator(".served")).to_have_text("tiny")
        expect(dialog).to_have_count(0)
