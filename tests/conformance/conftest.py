"""The bundled model, served within the tests' process, and the clients of others, unmodified."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from isotherm.cluster.local.server import InProcessServer, serve_in_process


@pytest.fixture(scope="package")
def server() -> Iterator[InProcessServer]:
    server = serve_in_process("tiny")
    yield server
    server.close()


@pytest.fixture(scope="package")
def client(server: InProcessServer) -> Iterator[openai.OpenAI]:
    transport = httpx.HTTPTransport(uds=server.socket)
    with openai.OpenAI(
        base_url="http://tiny/v1", api_key="none", max_retries=0, http_client=httpx.Client(transport=transport)
    ) as made:
        yield made
