"""Whether a served model answers over HTTP: what "ready" means. Standard library only: it runs in a process of Ray's
too. No proxy is asked."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from isotherm.cluster.errors import IsothermError, one_line

PAUSE = 0.2  # seconds between two attempts
ATTEMPT_SECONDS = 60.0
NOT_YET = (404, 408, 429)  # 404: Serve's proxy does not know the route yet


@dataclass(frozen=True)
class Asked:
    """The front door that is asked. `key`: one that it takes; `certificate`: the file of its own, where it speaks
    TLS."""

    url: str
    model: str
    key: str | None = None
    certificate: str | None = None


class NoAnswerError(IsothermError, RuntimeError):
    """No request is answered."""


def wait_for_answer(asked: Asked, seconds: float = 300.0) -> None:
    """Until one token has been generated over HTTP. Raises NoAnswerError where that takes too long, or the request is
    refused for good."""
    deadline, last = time.monotonic() + seconds, "not asked"
    while (left := deadline - time.monotonic()) > 0:
        try:
            status, text = _ask(asked, min(left, ATTEMPT_SECONDS))
        except (OSError, http.client.HTTPException) as error:
            last = one_line(error)
        else:
            if status == 200:
                return
            last = f"HTTP {status}: {text[:500]}"
            if status < 500 and status not in NOT_YET:
                break
        time.sleep(PAUSE)
    raise NoAnswerError(f"the workers are up, but no request to {asked.url}/v1/completions is answered ({last})")


def _ask(asked: Asked, timeout: float) -> tuple[int, str]:
    connection = connect(asked.url, timeout, asked.certificate)
    try:
        body = json.dumps({"model": asked.model, "prompt": "1", "max_tokens": 1, "temperature": 0})
        headers = {"content-type": "application/json"}
        if asked.key is not None:
            headers["authorization"] = f"Bearer {asked.key}"
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def connect(url: str, timeout: float, certificate: str | None) -> http.client.HTTPConnection:
    """To a front door on this machine. Over TLS it must have that very certificate, whatever name stands in it."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if certificate is None:
        return http.client.HTTPConnection(host, parts.port, timeout=timeout)
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return http.client.HTTPSConnection(host, parts.port, timeout=timeout, context=context)
