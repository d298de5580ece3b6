from __future__ import annotations

import pytest

from isotherm.cluster.api.error_forms import error_body
from isotherm.cluster.api.errors import ReplyError


def test_each_route_has_its_own_form():
    error = ReplyError("n: too many", param="n", code="c")
    openai = {"error": {"message": "n: too many", "type": "invalid_request_error", "param": "n", "code": "c"}}
    anthropic = {"type": "error", "error": {"type": "invalid_request_error", "message": "n: too many"}}
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messagesque", "/"):
        assert error_body(path, error) == openai
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/nope", "//v1/messages", "/v1//messages/"):
        assert error_body(path, error) == anthropic


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (415, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_anthropics_kind_follows_from_the_status(status, kind):
    assert error_body("/v1/messages", ReplyError("x", status=status))["error"] == {"type": kind, "message": "x"}


def test_the_message_names_the_field():
    said = error_body("/v1/messages", ReplyError("budget_tokens is too much", param="thinking.budget_tokens"))
    assert said["error"]["message"] == "thinking.budget_tokens: budget_tokens is too much"
