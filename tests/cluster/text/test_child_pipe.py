"""A template's child that others kill or stop: the chat is rendered all the same, and nothing waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from faults import stop

from isotherm.cluster.text.chat_template import ChatTemplate, ChatTemplateLimitError
from isotherm.cluster.text.child_pipe import ask, send

pytestmark = pytest.mark.slow

# Long enough to be struck in the midst of it; `word` is what a large request has.
SOURCE = "{% for i in range(rounds) %}{% for j in range(rounds) %}{% endfor %}{% endfor %}{{ word }}"


@pytest.fixture
def template():
    made = ChatTemplate({"default": SOURCE}, time_limit=1.0)
    assert made.render({"rounds": 1, "word": "x"}).text == "x"
    yield made
    made.close()


def test_a_child_that_is_killed_in_the_midst_of_a_chat_is_replaced(template: ChatTemplate):
    child = template._child
    stop(child.pid)  # so that it cannot have answered before it is killed
    with ThreadPoolExecutor(1) as pool:
        chat = pool.submit(template.render, {"rounds": 10, "word": "whole"})
        time.sleep(0.2)
        child.kill()
        assert chat.result(30).text == "whole"
    assert template._child is not child


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["small", "more than a pipe holds"])
def test_a_child_that_is_stopped_is_not_waited_for(template: ChatTemplate, size: int):
    child = template._child
    stop(child.pid)
    begin = time.monotonic()
    assert template.render({"rounds": 1, "word": "x" * size}).text == "x" * size
    assert 1.0 < time.monotonic() - begin < 30 and child.returncode == -signal.SIGKILL


def test_what_its_own_timer_ends_is_not_tried_again(template: ChatTemplate):
    begin = time.monotonic()
    with pytest.raises(ChatTemplateLimitError, match="ran for more than 1 s"):
        template.render({"rounds": 10**5, "word": "x"})
    assert time.monotonic() - begin < 1.9
    assert template.render({"rounds": 1, "word": "next"}).text == "next"


def test_a_frame_to_nobody_and_one_that_nobody_answers():
    code = (
        "import sys; sys.stdin.buffer.read(9); sys.stdout.buffer.write(b'half'); sys.stdout.flush(); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as child:
        os.set_blocking(child.stdin.fileno(), False)
        with pytest.raises(TimeoutError):
            ask(child, b"x", 1.0)
        child.kill()
        child.wait()
        with pytest.raises(BrokenPipeError):
            send(child, b"x", 1.0)
        with pytest.raises((EOFError, BrokenPipeError)):
            ask(child, b"x", 1.0)
