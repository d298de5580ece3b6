"""Which proxy a server is asked through, and what a user is told of one that cannot be used."""

from __future__ import annotations

import os

import httpx
import pytest

from isotherm.cluster import proxies
from isotherm.cluster.proxies import ProxyError, proxy_for


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def asked_through(url: str) -> str | None:
    proxy = proxy_for(httpx.URL(url))
    return None if proxy is None else str(proxy.url)


@pytest.mark.parametrize("variables", [
    {"ALL_PROXY": "socks5://127.0.0.1:1"}, {"all_proxy": "foo://h:1"}, {"http_proxy": "h:abc", "no_proxy": "[::1"},
])  # fmt: skip
@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "[::1]", "0.0.0.0"])
def test_this_machine_is_asked_directly_whatever_is_named(monkeypatch, variables: dict[str, str], host: str):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert asked_through(f"http://{host}:8000") is None


def test_the_schemes_own_proxy_comes_before_the_one_for_all(monkeypatch):
    assert asked_through("http://a.example") is None
    monkeypatch.setenv("ALL_PROXY", "http://all:1")
    monkeypatch.setenv("https_proxy", "safe:2")
    monkeypatch.setenv("HTTPS_PROXY", "foo://not.this.one")
    assert asked_through("http://a.example") == "http://all:1"
    assert asked_through("https://a.example") == "http://safe:2"


@pytest.mark.parametrize(("entries", "direct"), [
    ("*", True), ("b, *", True), ("a.example", True), (".A.example", True), ("example", True), ("*.example", True),
    ("x.a.example", False), ("xa.example", False), ("ample", False), ("", False), (",", False), ("[::1", False),
    ("a.example:8000", True), ("a.example:81", False), ("http://a.example", True), ("https://a.example", False),
    ("all://a.example", True), ("x://*", False), ("[", False), ("a:b:c", False),
])  # fmt: skip
def test_what_no_proxy_names_is_asked_directly(monkeypatch, entries: str, direct: bool):
    monkeypatch.setenv("http_proxy", "http://p:1")
    monkeypatch.setenv("NO_PROXY", entries)
    assert (asked_through("http://a.example:8000") is None) is direct
    monkeypatch.setenv("NO_PROXY", f"{entries},fe80::1,10.0.0.5")
    assert asked_through("http://[fe80::1]:8000") is asked_through("http://10.0.0.5") is None


@pytest.mark.parametrize(("variable", "value", "words"), [
    ("ALL_PROXY", "socks5://h:1", "pip install 'httpx"), ("all_proxy", "socks5h://h:1", "pip install 'httpx"),
    ("http_proxy", "foo://h:1", "must be a proxy such as http"), ("HTTP_PROXY", "h:abc", "must be"),
    ("http_proxy", "h:99999", "must be"), ("http_proxy", "http://[::1", "must be"),
    ("http_proxy", "http://", "must be"),
])  # fmt: skip
def test_one_that_cannot_be_used_is_named(monkeypatch, variable: str, value: str, words: str):
    monkeypatch.setattr(proxies, "find_spec", lambda name: None)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ProxyError, match=f"^{variable} is '.*{words}.*a.example in no_proxy") as info:
        proxy_for(httpx.URL("http://a.example:8000"))
    assert "\n" not in str(info.value)
    monkeypatch.setenv("no_proxy", "a.example")
    assert asked_through("http://a.example:8000") is None


def test_a_socks_proxy_is_taken_where_its_package_is(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://h:1")
    monkeypatch.setattr(proxies, "find_spec", lambda name: object())
    assert asked_through("http://a.example") == "socks5://h:1"


def test_a_password_is_not_shown(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "foo://me:secret@h:1")
    with pytest.raises(ProxyError, match="foo://…@h:1") as info:
        proxy_for(httpx.URL("http://a.example"))
    assert "secret" not in str(info.value)
