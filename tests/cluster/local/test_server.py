"""`Client.local`: the engine in this process, with real answers of the bundled model."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Literal

import pytest
from loaded_model import alone
from pydantic import BaseModel

from isotherm.cluster.client import (
    AsyncClient,
    BadRequestError,
    Client,
    NotFoundError,
    OutputCutError,
    StreamBrokenError,
)
from isotherm.cluster.local import server
from isotherm.cluster.manifest import ManifestError
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.path import ModelNotFoundError, bundled_model
from isotherm.cluster.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

ASKED = "Count from 1 to 9."


@pytest.fixture(scope="module")
def local():
    with Client.local("tiny") as client:
        yield client


@pytest.fixture(scope="module")
def answer() -> str:
    """What an engine of its own says to ASKED."""
    tokenizer = Tokenizer.load(bundled_model())
    prompt = tokenizer.encode_chat([{"role": "user", "content": ASKED}]).ids
    params = SamplingParams(60, 0.0, stop_token_ids=tuple(tokenizer.eos_token_ids))
    stream = tokenizer.stream()
    text = stream.push(alone(GenerationRequest("alone", tuple(prompt), params))).text + stream.flush()
    tokenizer.chat_template.close()
    return text


def test_it_answers_as_the_engine_does(local, answer):
    assert local.models() == ["tiny"] and local.ready()
    reply = local.chat(ASKED, temperature=0, max_tokens=60)
    assert reply.text == answer and reply.finish_reason == "stop" and reply.usage.completion_tokens > 10
    assert reply.system_fingerprint.startswith("isotherm-")
    (worker,) = local.status()["workers"]
    assert worker["pid"] == os.getpid() and worker["tokens"] >= reply.usage.completion_tokens


def test_its_streams_stream(local, answer):
    """The first pieces come while the engine still computes: it is seen running."""
    running = []
    with local.stream(ASKED, temperature=0, max_tokens=400, ignore_eos=True) as stream:
        for piece in stream:
            if piece.text and not running:
                running.append(local.status()["workers"][0]["running"])
    assert running == [1] and stream.completion.text.startswith(answer)


def test_requests_run_side_by_side(local):
    questions = [f"What is {i} + {i + 1}?" for i in range(12)]
    together = local.batch([{"messages": [{"role": "user", "content": q}], "temperature": 0} for q in questions])
    alone = [local.chat(q, temperature=0).text for q in questions]
    assert [one.text for one in together] == alone


class Sum(BaseModel):
    first: int
    second: int
    total: int


def test_typed_answers_are_of_their_type(local):
    """Whatever the model would rather say: at temperature 1 too."""
    assert local.parse("What is 3 + 4?", Sum, temperature=0, max_tokens=200).first == 3
    for seed in range(3):
        said = local.parse("Tell me a story.", Literal["yes", "no"], seed=seed, max_tokens=20)
        assert said in ("yes", "no")
        assert isinstance(local.parse("Is it?", bool, seed=seed, max_tokens=20), bool)
    with pytest.raises(OutputCutError) as info:
        local.parse("What is 3 + 4?", Sum, temperature=0, max_tokens=5)
    assert info.value.text.startswith("{")


def weather(city: str, days: int = 1) -> str:
    """Get the weather of a city."""
    return f"sunny in {city} for {days}"


def test_tools_are_called_and_streamed(local):
    said = [{"role": "user", "content": "What is the weather in Oslo?"}]
    reply = local.chat(said, tools=[weather], temperature=0)
    (call,) = reply.tool_calls
    assert reply.finish_reason == "tool_calls" and call.run(weather) == "sunny in Oslo for 1"
    with local.stream(said, tools=[weather], temperature=0) as stream:
        (streamed,) = stream.rest().tool_calls
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments) and streamed.id != call.id
    assert local.chat([*said, reply.message, call.result("rain")], tools=[weather], temperature=0).text


def test_leaving_a_stream_ends_its_request(local):
    with local.stream("Tell me a story.", max_tokens=3000, ignore_eos=True, temperature=0) as stream:
        next(stream)
    deadline = time.monotonic() + 20
    while local.status()["workers"][0]["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_errors_are_the_front_doors(local):
    with pytest.raises(BadRequestError, match="temperature") as info:
        local.chat("hi", temperature=9)
    assert info.value.param == "temperature"
    with pytest.raises(NotFoundError):
        local.scale(expert_groups=2)  # there is no cluster


def test_tokens_of_texts_and_chats(local):
    ids = local.tokenize("What is 3 + 4?", add_special_tokens=False)
    assert local.detokenize(ids) == "What is 3 + 4?" and len(local.tokenize("What is 3 + 4?")) == len(ids) + 1
    chat = local.tokenize([{"role": "user", "content": ASKED}])
    assert len(chat) == local.chat(ASKED, max_tokens=1).usage.prompt_tokens


def test_batches_on_the_server_are_refused_in_words(local):
    refused = local.request("GET", "/v1/batches")
    assert refused.status >= 400 and "Client.batch" in refused.body["error"]["message"]


def test_its_socket_is_this_processes_alone(local):
    """Nothing in the file system leads to it but this process's own descriptor."""
    path = local._server.socket
    assert path.startswith("/proc/self/fd/") and stat.S_ISSOCK(os.stat(path).st_mode)
    code = f"import os; print(os.path.exists({path!r}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_signal_while_it_starts_leaves_nothing(tmp_path):
    """Its folder lived as long as it did, and a process that SIGTERM ends removes nothing."""
    code = (
        "import os, signal\n"
        "from isotherm.cluster.local.server import InProcessServer\n"
        "InProcessServer(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_client_for_asyncio(answer):
    """Its own engine; closed, nothing is left of it."""

    async def go():
        async with await AsyncClient.local("tiny") as client:
            socket = client._server.socket
            async with client.stream(ASKED, temperature=0, max_tokens=60) as stream:
                async for _ in stream:
                    pass
            await asyncio.gather(*(client.chat("hi", max_tokens=5) for _ in range(4)))
            return stream.completion.text, socket

    threads = set(threading.enumerate())
    text, socket = asyncio.run(go())
    assert text == answer and not os.path.exists(socket)
    deadline = time.monotonic() + 10
    while {thread.name for thread in set(threading.enumerate()) - threads} & {"front door", "step loop"}:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_closing_ends_what_is_open():
    client = Client.local("tiny")
    stream = client.stream("Tell me a story.", max_tokens=3000, ignore_eos=True)
    next(stream)
    begin = time.monotonic()
    client._server.close()
    with pytest.raises(StreamBrokenError):
        stream.rest()
    client.close()
    assert time.monotonic() - begin < 10


def test_a_manifest_says_what_is_served(tmp_path):
    (tmp_path / "m.yaml").write_text("model: tiny\nserved_name: mine\nengine: {max_model_len: 64}\n")
    with Client.local(str(tmp_path / "m.yaml")) as client:
        assert client.models() == ["mine"] and client.model()["max_model_len"] == 64


@pytest.mark.parametrize(("model", "error"), [("no/such/model/here", ModelNotFoundError), ("none.yaml", ManifestError)])
def test_what_cannot_be_served_is_said_and_leaves_nothing(model, error):
    before = set(Path(tempfile.gettempdir()).glob("isotherm-*"))
    with pytest.raises(error):
        Client.local(model)
    assert set(Path(tempfile.gettempdir()).glob("isotherm-*")) <= before


def test_a_front_door_that_cannot_be_made_leaves_no_engine(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no front door")

    monkeypatch.setattr(server, "front_door", refuse)
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="no front door"):
        Client.local("tiny")
    assert set(threading.enumerate()) <= before


def test_a_process_that_does_not_close_it_ends_all_the_same(tmp_path):
    code = (
        "from isotherm.cluster.client import Client\n"
        "client = Client.local('tiny')\n"
        "next(client.stream('Tell me a story.', max_tokens=3000, ignore_eos=True))\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert list(tmp_path.iterdir()) == []
