"""The chat, over an engine that says what it is told."""

from __future__ import annotations

import json

from pages import ask
from playwright.sync_api import expect


def test_a_streamed_answer(window, serves):
    with serves() as (stand_in, url):
        stand_in.says("One **two** three.\n\n```python\nprint(1)\n```\n")
        page = window.open(url)
        ask(page, "Count.")
        answer = page.locator(".said.model")
        expect(answer.locator("footer .facts")).to_contain_text("tokens/s")
        expect(answer.locator("footer .facts")).to_contain_text("first after")
        expect(answer.locator("strong")).to_have_text("two")
        expect(answer.locator("pre code")).to_have_text("print(1)")
        expect(answer.get_by_role("button", name="Copy", exact=True)).to_be_visible()
        # It is kept, and there again.
        page.reload()
        expect(page.locator(".said.model strong")).to_have_text("two")
        expect(page.locator(".past-title")).to_have_text("Count.")
        page.get_by_role("button", name="New chat").click()
        expect(page.locator(".said")).to_have_count(0)


def test_stop_and_try_again(window, serves):
    with serves() as (stand_in, url):
        stand_in.engine.script, stand_in.engine.delay_s = stand_in.tokenizer.encode("on and on "), 0.02
        page = window.open(url)
        ask(page, "Go on.")
        expect(page.locator(".said.model .markdown")).to_contain_text("on and on")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".said.model footer .facts")).to_contain_text("stopped")
        while stand_in.engine.open:  # ended once the server has seen that nobody listens
            page.wait_for_timeout(20)
        stand_in.says("At last.")
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(".said.model .markdown")).to_have_text("At last.")
        expect(page.locator(".said.user")).to_have_count(1)
        page.locator(".said.user").hover()
        page.get_by_role("button", name="Edit and ask again").click()
        expect(page.get_by_label("Message", exact=True)).to_have_value("Go on.")


def test_settings_are_asked_for_and_a_wrong_one_is_shown(window, serves):
    with serves() as (stand_in, url):
        page = window.open(url)
        page.get_by_role("button", name="Settings", exact=True).click()
        page.get_by_label("Temperature").fill("warm")
        ask(page, "Hi")
        expect(page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_label("Seed").fill("7")
        page.get_by_label("System prompt").fill("Be brief.")
        ask(page, "Hi")
        expect(page.locator(".said.model footer .facts")).to_contain_text("tokens")
        params = stand_in.engine.seen[-1].params
        assert (params.temperature, params.seed) == (0.5, 7)
        page.get_by_role("button", name="As code").click()
        dialog = page.get_by_role("dialog")
        expect(dialog.locator("pre")).to_contain_text("/v1/chat/completions")
        body = dialog.locator("pre").inner_text().split("-d '", 1)[1].rsplit("'", 1)[0]
        assert json.loads(body)["messages"][0] == {"role": "system", "content": "Be brief."}
        dialog.get_by_label("Python").check()
        code = dialog.locator("pre").inner_text()
        compile(code, "shown", "exec")
        assert "client.chat(" in code and "temperature=0.5" in code


def test_thoughts_are_folded_and_errors_shown(window, serves):
    with serves() as (stand_in, url):
        stand_in.says("<think>Hm, hm.</think>So.")
        page = window.open(url)
        page.get_by_role("button", name="Settings", exact=True).click()
        page.get_by_label("On", exact=True).check()
        stand_in.says("Hm, hm.</think>So.")
        ask(page, "Think.")
        expect(page.locator(".thought summary")).to_have_text("Thought")
        expect(page.locator(".thought .markdown")).to_be_hidden()
        expect(page.locator(".said.model > .markdown")).to_have_text("So.")
        stand_in.engine.fail_after = 2
        ask(page, "Fail.")
        expect(page.get_by_role("alert")).to_contain_text("the forward pass failed")
