"""The page's files, and how they are handed out."""

from __future__ import annotations

import asyncio
import gzip
import re

import httpx
import pytest
from fake_engine import FakeEngine

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.page.bundle import assets


@pytest.fixture(scope="module")
def app():
    return build_app(FakeEngine(100), None, "m")  # type: ignore[arg-type]


def get(app, path: str, **headers: str) -> httpx.Response:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return asyncio.run(go())


def test_the_whole_bundle_is_small():
    assert sum(len(asset.plain) for asset in assets().values()) < 200_000


def test_every_file_that_is_named_is_there_and_nothing_from_elsewhere():
    for name, asset in assets().items():
        text = asset.plain.decode()
        for used in re.findall(r'(?:from|href=|src=) ?"(\./|/page/)([^"]+)"', text):
            assert used[1] in assets(), (name, used)
        outside = set(re.findall(r"https?://[\w.-]+", text)) - {"http://www.w3.org"}
        assert not outside, (name, outside)


def test_no_text_can_become_markup():
    """The browser refuses it too (Trusted Types): this finds it earlier."""
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|srcdoc"
    for name, asset in assets().items():
        assert not re.search(forbidden, asset.plain.decode()), name
    index = assets()["index.html"].plain.decode()
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]* src=)", index)


def test_a_strict_policy(app):
    answer = get(app, "/")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in str(policy) and policy["frame-ancestors"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["content-type"].startswith(
        "text/html"
    )


@pytest.mark.parametrize("name", ["main.js", "base.css", "icon.svg"])
def test_files_are_packed_and_asked_for_anew_only_where_they_have_changed(app, name):
    plain, packed = (
        get(app, f"/page/{name}", accept_encoding="identity"),
        get(app, f"/page/{name}", accept_encoding="gzip"),
    )
    assert plain.content == packed.content == gzip.decompress(assets()[name].packed)
    assert "content-encoding" not in plain.headers and packed.headers["content-encoding"] == "gzip"
    tags = plain.headers["etag"], packed.headers["etag"]
    assert tags[0] != tags[1] and packed.headers["vary"] == "accept-encoding"
    again = get(app, f"/page/{name}", accept_encoding="gzip", if_none_match=f'"x", W/{tags[1]}')
    assert again.status_code == 304 and not again.content
    assert get(app, f"/page/{name}", accept_encoding="gzip", if_none_match='"x"').status_code == 200


@pytest.mark.parametrize("path", ["/page/none.js", "/page/index.html", "/page/..%2fbundle.py", "/page/__init__.py"])
def test_nothing_else_is_handed_out(app, path):
    assert get(app, path).status_code == 404
