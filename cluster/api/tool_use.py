"""What the tools of a chat come to: whether the model can be offered them, what makes calls of its output, and what the
output is held to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.tools import ToolsBody
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.api.prepare import Served
from isotherm.cluster.api.structure import output_grammar
from isotherm.cluster.messages.requests import Constraint
from isotherm.cluster.text.grammar import MOST_CHARS
from isotherm.cluster.text.json_schema import GrammarError, SlowGrammarError
from isotherm.cluster.text.tokenizer_files import TokenizerError
from isotherm.cluster.text.tool_formats.base import Offer, Tool, ToolFormat, ToolParser
from isotherm.cluster.text.tool_formats.output_grammar import grammar_of_calls

_TRIED = 32  # tools, one by one, for those that cannot be had
_LOOSENED = 4  # of these; each may take a second, and where there are more none of the request's is enforced


def call_parsers(body: ToolsBody, served: Served, reply_id: str) -> Callable[[int], ToolParser] | None:
    """The parser of a choice's calls, by the choice's index; None where nothing may be called. Raises ReplyError."""
    tools = body.callable_tools
    if not tools:
        return None
    form = _known(served)

    def parser(choice: int) -> ToolParser:
        return form.parser(Offer(tools, partial(_call_id, reply_id, choice), body.calls_in_parallel))

    return parser


def constrains_calls(body: ChatBody) -> bool:
    """Whether the output is held to a grammar that has calls in it."""
    tools = body.callable_tools
    return body.must_call or any(tool.strict for tool in tools) or bool(tools and body.structure)


def call_constraint(body: ChatBody, served: Served, after: tuple[int, ...]) -> Constraint:
    """For a body whose calls are constrained; `after`: as Constraint has it. What else the body wants of its output is
    about text, and may stand in place of calls unless something must be called. A tool that is not strict, and whose
    schema cannot be enforced, may be called with any arguments, as elsewhere. Raises ReplyError, which names the strict
    tool that cannot be had."""
    form, tools = _known(served), body.callable_tools
    answer = "" if body.must_call else output_grammar(body, served.tokenizer, served.limits.vocab_size)

    def checked(some: tuple[Tool, ...]) -> str:
        control_tokens, parallel = served.tokenizer.control_tokens, body.calls_in_parallel
        text = grammar_of_calls(form, some, control_tokens, must_call=body.must_call, parallel=parallel, answer=answer)
        if len(text) > MOST_CHARS:
            raise GrammarError(f"the grammar has {len(text)} characters; at most {MOST_CHARS} are taken")
        served.tokenizer.grammar_vocabulary(served.limits.vocab_size).check(text)
        return text

    try:
        return Constraint(checked(tools), after, "tools")
    except TokenizerError as error:
        raise ReplyError(f"tools: {error}", param="tools") from None
    except GrammarError as error:
        why = error
    loose = _to_loosen(body, tools, checked)
    for names in (loose, {tool.name for tool in tools}):
        if isinstance(why, SlowGrammarError):
            break  # a request's grammar must not depend on how busy this machine is
        try:
            return Constraint(checked(_loosened(tools, names)), after, "tools")
        except GrammarError as error:
            why = error
    raise ReplyError(f"tools: all together: {why}", param="tools")


def _to_loosen(body: ToolsBody, tools: tuple[Tool, ...], checked: Callable[[tuple[Tool, ...]], str]) -> set[str]:
    """Names of tools that cannot be enforced, the first few. Raises ReplyError where one of these is strict, or takes
    too long."""
    found: set[str] = set()
    for tool in tools[:_TRIED]:
        try:
            checked((tool,))
        except GrammarError as error:
            if tool.strict or isinstance(error, SlowGrammarError):
                raise _refused(body, tool.name, error) from None
            found.add(tool.name)
            if len(found) == _LOOSENED:
                break
    return found


def _loosened(tools: tuple[Tool, ...], names: set[str]) -> tuple[Tool, ...]:
    """With any arguments for those of these names that are not strict."""
    return tuple(replace(tool, parameters={}) if tool.name in names and not tool.strict else tool for tool in tools)


def _refused(body: ToolsBody, name: str, error: GrammarError) -> ReplyError:
    """The error that is about one tool."""
    at = next(i for i, tool in enumerate(body.tools or ()) if tool.function.name == name)
    param = f"tools[{at}].function.parameters"
    return ReplyError(f"{param}: {error}", param=param)


def _known(served: Served) -> ToolFormat:
    if served.tool_format is None:
        raise ReplyError(
            "tools: the form in which this model calls tools is not known: its chat template shows none that is, and "
            'the manifest\'s tool_format names none. With tool_choice "none" the model is told of them and calls none',
            param="tools",
        )
    return served.tool_format


def _call_id(reply_id: str, choice: int, index: int) -> str:
    """The id of a call: the same however often its reply is made."""
    return f"call_{hashlib.blake2b(f'{reply_id}/{choice}/{index}'.encode(), digest_size=12).hexdigest()}"
