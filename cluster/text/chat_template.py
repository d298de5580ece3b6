"""Renders a model's chat template. A template is a program from a stranger, so it runs in a small child process that
the kernel ends.

jinja2's sandbox keeps a template from the interpreter, but not from time and memory: `{{ 9 ** (9 ** 9) }}` or a doubled
string spends both inside one C call, which no thread can interrupt, and constant folding does so already at compile
time. So compiling and rendering happen in a child with an address-space limit and an interval timer whose default
action (SIGALRM ends the process) needs no help from Python. The next render starts a fresh child.

Knows nothing about tokens. Imports only the standard library and jinja2, so that the child starts fast."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from datetime import datetime
from typing import IO, Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isotherm.cluster.errors import IsothermError, named_line
from isotherm.cluster.jsontypes import JSON

_FRAME = struct.Struct(">Q")  # payload bytes; the payload is JSON


class ChatTemplateError(IsothermError):
    """The template refused these messages, or could not handle them."""


class ChatTemplateLimitError(ChatTemplateError):
    """Rendering passed the time, memory or output limit."""


class ChatTemplateBrokenError(ChatTemplateError):
    """The template itself does not compile: no messages would render."""


class ChatTemplate:
    """The templates of one model by name ("default", "tool_use", …). Thread-safe; renders one chat at a time.

    `time_limit` is in seconds of wall clock for one render (the compilation counts as part of the first),
    `memory_limit` in bytes of address space, `max_chars` in characters of output."""

    def __init__(
        self,
        templates: Mapping[str, str],
        *,
        time_limit: float = 5.0,
        memory_limit: int = 1 << 30,
        max_chars: int = 16 << 20,
    ) -> None:
        if not templates:
            raise ValueError("no chat template given")
        self.sources = dict(templates)
        self._setup = {
            "templates": self.sources,
            "time_limit": time_limit,
            "memory_limit": memory_limit,
            "max_chars": max_chars,
        }
        self._names = set(templates)
        self._time_limit = time_limit
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, context: Mapping[str, Any]) -> str:
        """The rendered prompt. As transformers does, a chat with `tools` takes the template named "tool_use" where
        there is one. Blocks: call it from a worker thread. Raises ChatTemplateError or one of its kinds."""
        name = "tool_use" if context.get("tools") is not None and "tool_use" in self._names else "default"
        if name not in self._names:
            raise ChatTemplateBrokenError(
                f"the model has several chat templates ({', '.join(sorted(self._names))}) and none named 'default'"
            )
        try:
            payload = json.dumps({"name": name, "context": context}).encode()
        except RecursionError:
            raise ChatTemplateLimitError("the messages or template arguments are nested too deeply") from None
        with self._lock:
            reply = self._ask(payload)
        if (text := reply.get("text")) is not None:
            return text
        kinds = {"broken": ChatTemplateBrokenError, "limit": ChatTemplateLimitError}
        raise kinds.get(reply["kind"], ChatTemplateError)(reply["message"])

    def close(self) -> None:
        """Ends the child process, if there is one."""
        with self._lock:
            self._end_child()

    def _ask(self, payload: bytes) -> dict[str, str]:
        """{"text": …}, or {"kind": …, "message": …}."""
        if self._child is None or self._child.poll() is not None:
            self._end_child()
            self._child = _start_child()
            self._ending = weakref.finalize(self, _end, self._child)  # for those who forget this object
            self._ending.atexit = False  # it ends by itself when this process has gone
            _write(self._child.stdin, json.dumps(self._setup).encode())
        child = self._child
        try:
            _write(child.stdin, payload)
            reply = _read(child.stdout)
        except (BrokenPipeError, EOFError):
            child.wait()
            self._end_child()
            if child.returncode == -signal.SIGALRM:
                return {"kind": "limit", "message": f"the chat template ran for more than {self._time_limit:g} s"}
            return {"kind": "limit", "message": f"the chat template's process ended (status {child.returncode})"}
        said: dict[str, str] = json.loads(reply)
        return said

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
        "from isotherm.cluster.text.chat_template import child_main; child_main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def _write(pipe: IO[bytes] | None, payload: bytes) -> None:
    assert pipe is not None
    pipe.write(_FRAME.pack(len(payload)) + payload)
    pipe.flush()


def _read(pipe: IO[bytes] | None) -> bytes:
    """One payload. Raises EOFError when the other end has gone."""
    assert pipe is not None
    header = pipe.read(_FRAME.size)
    if len(header) < _FRAME.size:
        raise EOFError
    (size,) = _FRAME.unpack(header)
    payload = pipe.read(size)
    if len(payload) < size:
        raise EOFError
    return payload


def child_main() -> None:
    """The child's whole life: a setup frame, then one reply per request, until the parent closes the pipe (or dies)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the terminal's process group; the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    try:
        setup = json.loads(_read(stdin))
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = setup["memory_limit"] if hard == resource.RLIM_INFINITY else min(setup["memory_limit"], hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        environment = make_environment()
        compiled: dict[str, Any] = {}
        while True:
            request = _read(stdin)
            signal.setitimer(signal.ITIMER_REAL, setup["time_limit"])
            reply = _render(environment, compiled, setup, json.loads(request))
            _write(stdout, json.dumps(reply).encode())
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _render(
    environment: ImmutableSandboxedEnvironment, compiled: dict[str, Any], setup: JSON, request: JSON
) -> dict[str, str]:
    name = request["name"]
    try:
        if name not in compiled:
            compiled[name] = environment.from_string(setup["templates"][name])
    except MemoryError:
        return {"kind": "limit", "message": "the chat template needs too much memory to compile"}
    except (TemplateSyntaxError, RecursionError, ValueError) as error:
        return {"kind": "broken", "message": f"the model's chat template does not compile: {error}"}
    parts: list[str] = []
    size = 0
    try:
        for part in compiled[name].generate(**request["context"]):
            size += len(part)
            if size > setup["max_chars"]:
                return {
                    "kind": "limit",
                    "message": f"the chat template's output passed {setup['max_chars']} characters",
                }
            parts.append(part)
        return {"text": "".join(parts)}
    except MemoryError:
        parts.clear()
        return {
            "kind": "limit",
            "message": f"the chat template needed more than {setup['memory_limit']} bytes of memory",
        }
    except TemplateError as error:
        return {"kind": "refused", "message": str(error) or type(error).__name__}
    except Exception as error:  # anything at all can come out of a template's expressions
        return {"kind": "refused", "message": named_line(error)}


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's tokens for training (transformers). When serving,
    only its body counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers' `apply_chat_template` renders in
    (transformers/utils/chat_template_utils.py)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, >, & and ' for HTML, which a model never saw in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
