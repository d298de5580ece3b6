"""Whether a served model answers over HTTP: what "ready" means. Standard library only: it runs in a process of Ray's
too. No proxy is asked."""

from __future__ import annotations

import http.client
import json
import time
from urllib.parse import urlsplit

from isotherm.cluster.errors import IsothermError, one_line

PAUSE = 0.2  # seconds between two attempts
ATTEMPT_SECONDS = 60.0
NOT_YET = (404, 408, 429)  # 404: Serve's proxy does not know the route yet


class NoAnswerError(IsothermError, RuntimeError):
    """No request is answered."""


def wait_for_answer(url: str, model: str, seconds: float = 300.0) -> None:
    """Until one token has been generated over HTTP. Raises NoAnswerError where that takes too long, or the request is
    refused for good."""
    deadline, last = time.monotonic() + seconds, "not asked"
    while (left := deadline - time.monotonic()) > 0:
        try:
            status, text = _ask(url, model, min(left, ATTEMPT_SECONDS))
        except (OSError, http.client.HTTPException) as error:
            last = one_line(error)
        else:
            if status == 200:
                return
            last = f"HTTP {status}: {text[:500]}"
            if status < 500 and status not in NOT_YET:
                break
        time.sleep(PAUSE)
    raise NoAnswerError(f"the workers are up, but no request to {url}/v1/completions is answered ({last})")


def _ask(url: str, model: str, timeout: float) -> tuple[int, str]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        body = json.dumps({"model": model, "prompt": "1", "max_tokens": 1, "temperature": 0})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()
