"""The child process that renders chat templates, and the frames between it and cluster/text/chat_template.py.

Imports only the standard library and jinja2, so that it starts fast."""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from typing import IO, Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta

from isotherm.cluster.errors import named_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.text.template_environment import ChatEnvironment
from isotherm.cluster.text.template_text import own_runs, written

FRAME = struct.Struct(">Q")  # payload bytes; the payload is JSON
# A role is one of a few words, whoever says it, and templates make markers of it: '<|' + message.role + '|>'.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


def write_frame(pipe: IO[bytes] | None, payload: bytes) -> None:
    assert pipe is not None
    pipe.write(FRAME.pack(len(payload)) + payload)
    pipe.flush()


def read_frame(pipe: IO[bytes] | None) -> bytes:
    """One payload. Raises EOFError when the other end has gone."""
    assert pipe is not None
    header = pipe.read(FRAME.size)
    if len(header) < FRAME.size:
        raise EOFError
    (size,) = FRAME.unpack(header)
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
        setup = json.loads(read_frame(stdin))
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = setup["memory_limit"] if hard == resource.RLIM_INFINITY else min(setup["memory_limit"], hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        environment = ChatEnvironment()
        compiled: dict[str, Template] = {}
        while True:
            request = read_frame(stdin)
            signal.setitimer(signal.ITIMER_REAL, setup["time_limit"])
            reply = _answer(environment, compiled, setup, json.loads(request))
            write_frame(stdout, json.dumps(reply).encode())
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _answer(environment: ChatEnvironment, compiled: dict[str, Template], setup: JSON, request: JSON) -> JSON:
    """{"text": …, "own": …} for a chat, {"variables": …} where no context is given, or {"kind": …, "message": …}."""
    name = request["name"]
    source = setup["templates"][name]
    try:
        if request.get("context") is None:
            return {"variables": sorted(meta.find_undeclared_variables(environment.parse(source)))}
        if name not in compiled:
            compiled[name] = environment.from_string(source)
    except MemoryError:
        return {"kind": "limit", "message": "the chat template needs too much memory to compile"}
    except (TemplateSyntaxError, RecursionError, ValueError) as error:
        return {"kind": "broken", "message": f"the model's chat template does not compile: {error}"}
    return _render(compiled[name], setup, {**request["context"], **_own(request)})


def _own(request: JSON) -> dict[str, Any]:
    """What of a context is the template's own text, though it stands in no template."""
    own: dict[str, Any] = {name: written(text) for name, text in request["special_tokens"].items()}
    messages = request["context"].get("messages")
    if isinstance(messages, list):
        own["messages"] = [
            {**message, "role": written(message["role"])} if message.get("role") in _ROLES else message
            for message in messages
        ]
    return own


def _render(template: Template, setup: JSON, context: dict[str, Any]) -> JSON:
    parts: list[str] = []
    size = 0
    try:
        for part in template.generate(context):
            size += len(part)
            if size > setup["max_chars"]:
                return {
                    "kind": "limit",
                    "message": f"the chat template's output passed {setup['max_chars']} characters",
                }
            parts.append(part)
        return {"text": "".join(parts), "own": own_runs(parts)}
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
