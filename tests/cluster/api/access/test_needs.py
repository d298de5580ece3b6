"""The rule behind the table; docs/access.md and the application are held against it in test_routes.py."""

from __future__ import annotations

import pytest

from isotherm.cluster.api.access.needs import is_open, is_work, needed_role


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("POST", "/v1/chat/completions", "use"),
        ("GET", "/v1/files/file-1/content", "use"),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/org/name", None),
        ("GET", "/v1/modelsx", "use"),
        ("HEAD", "/status", "observe"),
        ("GET", "/admin", "observe"),
        ("GET", "/admin/operations/op-1", "observe"),
        ("POST", "/admin/operations", "admin"),
        ("PATCH", "/admin/anything", "admin"),
        ("POST", "/administration", "use"),
        ("GET", "/what/nobody/knows", "use"),
    ],
)
def test_the_role_that_a_route_needs(method: str, path: str, role: str | None):
    assert needed_role(method, path) == role and not is_open(path)


def test_liveness_needs_no_key_and_what_looks_like_it_does():
    assert is_open("/health") and is_open("/ready")
    assert not any(is_open(path) for path in ("/health/x", "/healthz", "/", "", "/ready/"))


def test_what_counts_as_a_request_of_a_minute():
    assert is_work("POST", "/v1/messages") and is_work("POST", "/tokenize") and is_work("POST", "/v1/files")
    assert not is_work("GET", "/v1/files") and not is_work("POST", "/admin/operations")
