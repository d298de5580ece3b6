"""Renders a model's chat template. A template is a program from a stranger, so it runs in a small child process that
the kernel ends.

jinja2's sandbox keeps a template from the interpreter, but not from time and memory: `{{ 9 ** (9 ** 9) }}` or a doubled
string spends both inside one C call, which no thread can interrupt, and constant folding does so already at compile
time. So compiling and rendering happen in a child with an address-space limit and an interval timer whose default
action (SIGALRM ends the process) needs no help from Python. The next render starts a fresh child.

Knows nothing about tokens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.child_pipe import ask, send

START_SECONDS = 30.0  # for a child to be there, on a machine that is very busy
DEFAULT, TOOL_USE = "default", "tool_use"  # the names of templates for chats, and for chats with tools
# The variables that every template has, as far as the checkpoint names such a token
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplateError(IsothermError):
    """The template refused these messages, or could not handle them."""


class ChatTemplateLimitError(ChatTemplateError):
    """Rendering passed the time, memory or output limit."""


class ChatTemplateBrokenError(ChatTemplateError):
    """The template itself does not compile: no messages would render."""


@dataclass(frozen=True)
class RenderedChat:
    """A prompt as text, and where in it the template's own text begins and ends: (begin, end, begin, end, …). What lies
    outside came from the client."""

    text: str
    own: tuple[int, ...]

    def until(self, end: int) -> RenderedChat:
        """The beginning of it, `end` characters long."""
        own = [min(at, end) for at in self.own]
        pairs = zip(own[::2], own[1::2], strict=True)
        return RenderedChat(self.text[:end], tuple(at for pair in pairs if pair[0] < pair[1] for at in pair))


class ChatTemplate:
    """The templates of one model by name ("default", "tool_use", …). Thread-safe; renders one chat at a time.

    `time_limit` is in seconds of wall clock for one render (the compilation counts as part of the first),
    `memory_limit` in bytes of address space, `max_chars` in characters of output."""

    def __init__(
        self,
        templates: Mapping[str, str],
        *,
        special_tokens: Mapping[str, str] | None = None,
        time_limit: float = 5.0,
        memory_limit: int = 1 << 30,
        max_chars: int = 16 << 20,
    ) -> None:
        """`special_tokens`: those of SPECIAL_TOKENS that there are."""
        if not templates:
            raise ValueError("no chat template given")
        self.sources = dict(templates)
        self.special_tokens = dict(special_tokens or {})
        self._setup = {
            "templates": self.sources,
            "time_limit": time_limit,
            "memory_limit": memory_limit,
            "max_chars": max_chars,
        }
        self._time_limit = time_limit
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def choose(self, name: str | None = None, *, tools: bool = False) -> str:
        """The name of the template for a chat: the one asked for, else as transformers chooses: "tool_use" where there
        are tools and it is there, "default" otherwise. Raises ChatTemplateError."""
        names = ", ".join(sorted(self.sources))
        if name is not None:
            if name not in self.sources:
                raise ChatTemplateError(f"the model has no chat template named {name[:100]!r}; it has {names}")
            return name
        if tools and TOOL_USE in self.sources:
            return TOOL_USE
        if DEFAULT not in self.sources:
            raise ChatTemplateBrokenError(f"the model has several chat templates ({names}) and none named {DEFAULT!r}")
        return DEFAULT

    def render(self, context: Mapping[str, Any], name: str | None = None) -> RenderedChat:
        """The rendered prompt, by the template of that name, else by the one that `choose` takes. Blocks: call it from
        a worker thread. Raises ChatTemplateError or one of its kinds."""
        name = self.choose(name, tools=context.get("tools") is not None)
        reply = self._ask({"name": name, "context": context, "special_tokens": self.special_tokens})
        return RenderedChat(reply["text"], tuple(reply["own"]))

    def variables(self, name: str) -> frozenset[str]:
        """The variables that a template reads and does not set first. Blocks and raises as `render` does."""
        return frozenset(self._ask({"name": name})["variables"])

    def close(self) -> None:
        """Ends the child process, if there is one."""
        with self._lock:
            self._end_child()

    def _ask(self, request: Mapping[str, Any]) -> JSON:
        try:
            payload = json.dumps(request).encode()
        except RecursionError:
            raise ChatTemplateLimitError("the messages or template arguments are nested too deeply") from None
        with self._lock:
            reply = self._exchange(payload)
        if "kind" not in reply:
            return reply
        kinds = {"broken": ChatTemplateBrokenError, "limit": ChatTemplateLimitError}
        raise kinds.get(reply["kind"], ChatTemplateError)(reply["message"])

    def _exchange(self, payload: bytes) -> JSON:
        """The child's reply, or {"kind": …, "message": …} where it ended instead. One that somebody else has killed or
        stopped says nothing about the template: another child is asked."""
        status = 0
        for _ in range(2):
            child, seconds = self._child, 2 * self._time_limit  # its own timer ends it long before that
            fresh = child is None or child.poll() is not None
            if child is None or fresh:
                child, seconds = self._new_child(), seconds + START_SECONDS
            try:
                if fresh:
                    send(child, json.dumps(self._setup).encode(), START_SECONDS)
                said: JSON = json.loads(ask(child, payload, seconds))
                return said
            except TimeoutError:
                self._end_child()
            except (BrokenPipeError, EOFError):
                status = child.wait()
                self._end_child()
                if status not in (-signal.SIGKILL, -signal.SIGTERM):
                    break
        if status == -signal.SIGALRM:
            return {"kind": "limit", "message": f"the chat template ran for more than {self._time_limit:g} s"}
        return {"kind": "limit", "message": f"the chat template's process ended (status {status})"}

    def _new_child(self) -> subprocess.Popen[bytes]:
        self._end_child()
        self._child = child = _start_child()
        self._ending = weakref.finalize(self, _end, child)  # for those who forget this object
        self._ending.atexit = False  # it ends by itself when this process has gone
        return child

    def _end_child(self) -> None:
        if self._child is not None:
            self._child = None
            self._ending()


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _start_child() -> subprocess.Popen[bytes]:
    # The parent's sys.path, as multiprocessing's spawn passes it: under Ray the package may come from a runtime_env.
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from isotherm.cluster.text.template_child import child_main; child_main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdin is not None
    os.set_blocking(child.stdin.fileno(), False)
    return child
