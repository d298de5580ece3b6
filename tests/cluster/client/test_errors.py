from __future__ import annotations

import httpx
import pytest

from isotherm.cluster import client as sdk
from isotherm.cluster.client.errors import api_error
from isotherm.cluster.errors import IsothermError


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (200, sdk.APIError),
        (400, sdk.BadRequestError),
        (413, sdk.BadRequestError),
        (401, sdk.AuthenticationError),
        (403, sdk.PermissionDeniedError),
        (404, sdk.NotFoundError),
        (409, sdk.ConflictError),
        (429, sdk.RateLimitError),
        (500, sdk.ServerError),
        (502, sdk.ServerError),
        (503, sdk.UnavailableError),
    ],
)
def test_an_answers_error_is_of_the_kind_that_its_status_says(status, kind):
    error = api_error(status, "no", "n", "code")
    assert type(error) is kind and (error.status, error.message, error.param, error.code) == (status, "no", "n", "code")
    assert isinstance(error, sdk.APIError) and isinstance(error, sdk.ClientError) and isinstance(error, IsothermError)


def test_a_client_raises_it():
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, json={"error": {"message": "model: 'x' is not served", "param": "model"}})

    with (
        pytest.raises(sdk.NotFoundError, match="not served") as info,
        sdk.Client(transport=httpx.MockTransport(answer)) as client,
    ):
        client.chat("hi", model="x")
    assert info.value.param == "model"
