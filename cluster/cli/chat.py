"""`isotherm chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib

from rich.console import Console

from isotherm.cluster.cli.printable import printable
from isotherm.cluster.client import Client, ClientError, ConnectionFailedError
from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (its import gives input() line editing and a history)

# \001 and \002 tell readline which characters take no room; without a terminal the prompt is plain.
_PROMPT = "\001\033[1;36m\002> \001\033[0m\002"
_HELP = "Ctrl-C cuts an answer short, /new starts a new conversation, Ctrl-D ends."


class NoServerError(IsothermError, RuntimeError):
    """Nothing answers at the URL; the message says what to do."""


def chat_loop(url: str, system: str | None, temperature: float, max_tokens: int, console: Console) -> None:
    """Read lines and stream answers until end of input. An answer that fails is told and taken back, so the line can be
    sent again. Raises NoServerError and APIError when the server does not list its models."""
    begin = [{"role": "system", "content": system}] if system else []
    history = list(begin)
    with Client(url) as client:
        try:
            model = client.models()[0]
        except ConnectionFailedError as error:
            raise NoServerError(
                f"no server answers at {error}; start one with: isotherm serve, or name another with --url"
            ) from None
        _show(f"{model} at {url}\n{_HELP}\n", console, "dim")
        while (line := _read(console)) is not None:
            if line == "/new":
                history = list(begin)
                console.print("a new conversation", style="dim")
            elif line.startswith("/"):
                console.print(_HELP, style="dim")
            elif line:
                asked = [*history, {"role": "user", "content": line}]
                answer = _answer(
                    client,
                    {"model": model, "messages": asked, "temperature": temperature, "max_tokens": max_tokens},
                    console,
                )
                if answer is not None:
                    history = [*asked, {"role": "assistant", "content": answer}]


def _read(console: Console) -> str | None:
    """The next line; None at the end of input, or after a second Ctrl-C in a row."""
    interrupted = False
    while True:
        try:
            return input(_PROMPT if console.is_terminal else "> ").strip()
        except EOFError:
            console.print()
            return None
        except KeyboardInterrupt:
            console.print()
            if interrupted:
                return None
            interrupted = True
            console.print("Ctrl-C again, or Ctrl-D, ends.", style="dim")


def _answer(client: Client, request: JSON, console: Console) -> str | None:
    """Stream one answer to the console, its thought dimmed; None where it failed. One that is cut short counts as far
    as it came."""
    answer, thought, reason = "", "", None
    try:
        for chunk in client.chat(request.pop("messages"), stream=True, **request):
            if thought and chunk.text and not answer:
                console.print()
            answer += chunk.text
            thought += chunk.reasoning
            reason = chunk.finish_reason or reason
            _show(chunk.reasoning, console, "dim")
            _show(chunk.text, console)
    except KeyboardInterrupt:
        reason = "cut"
    except ClientError as error:
        _show(f"{chr(10) if answer or thought else ''}{error}\n", console, "red")
        return None
    console.print()
    if reason in ("cut", "length"):
        console.print(
            "(cut short)" if reason == "cut" else f"(cut at {request['max_tokens']} tokens; --max-tokens allows more)",
            style="dim",
        )
    return answer


def _show(text: str, console: Console, style: str | None = None) -> None:
    """What the server or its model says, which is text and nothing else."""
    text = printable(text, console.is_terminal)
    console.print(text, end="", style=style, markup=False, highlight=False, soft_wrap=True)
