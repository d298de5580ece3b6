"""What schemathesis makes of /openapi.json, sent to a served fake engine: no error of ours. ISOTHERM_FUZZ_EXAMPLES: how
many requests for each operation."""

from __future__ import annotations

import contextlib
import os
import warnings

import httpx
import pytest
from fake_engine import FakeEngine, http_server, write_tokenizer
from fake_observer import FakeObserver
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.batches.service import BatchLimits, BatchService
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.described import DESCRIBED
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.messages.feed import FeedTable
from isotherm.cluster.messages.operations import OperationError, parse_mode
from isotherm.cluster.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis.generation import GenerationMode

EXAMPLES = int(os.environ.get("ISOTHERM_FUZZ_EXAMPLES", 4))
CANARY = {"model": "m", "messages": [{"role": "user", "content": "canary"}], "max_tokens": 8, "temperature": 0}


class FakeAdmin:
    async def operate(self, body):
        raise OperationError("nothing can be scaled here", field="groups")

    async def operation(self, operation_id):
        return None

    async def operation_history(self):
        return []

    async def experts(self):
        return {}

    async def autoscaler(self):
        return {}

    async def set_autoscaler(self, body):
        return {"mode": parse_mode(body)}

    async def feed_part(self, last):
        """Everything, and then an end: schemathesis waits for that of each answer."""
        if last.startswith("epoch:"):
            raise EOFError
        return FeedTable("epoch").since(last)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schema")
    tokenizer = Tokenizer.load(write_tokenizer(folder))
    batches = BatchService(Store(folder, 1 << 24, 10_000), BatchLimits(), 100_000)
    settings = AppSettings(tool_format="hermes")
    engine = FakeEngine(tokenizer.vocab_size)
    app = build_app(
        engine, tokenizer, "m", settings=settings, admin=FakeAdmin(), batches=batches, observer=FakeObserver()
    )
    with http_server(app) as address:
        yield address
    tokenizer.chat_template.close()


def canary(url):
    return httpx.post(url + "/v1/chat/completions", json=CANARY).json()["choices"]


def send(label, strategy, url, sent):
    """A few cases of one strategy. Where nothing can be made that it asks for, such as a wrong GET /health, there are
    none."""

    @settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def each(case):
        answer = case.call(base_url=url)
        sent[label] = sent.get(label, 0) + 1
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        if answer.status_code >= 400 and case.method != "HEAD":
            assert answer.json()["error"]["message"], case.as_curl_command()

    with contextlib.suppress(Unsatisfiable):
        each()


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
def test_no_request_makes_an_error_of_ours(url):
    before, sent = canary(url), {}
    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:
            send(operation.label, operation.as_strategy(generation_mode=mode), url, sent)
    print(f"\n{sum(sent.values())} requests to {len(sent)} operations")
    wanted = {f"{method} {path.replace(':path', '')}" for method, path in DESCRIBED}
    assert sent.keys() == wanted - {"GET /openapi.json"}  # from where it has all this
    assert sent["POST /v1/chat/completions"] >= 2 * EXAMPLES
    assert canary(url) == before
