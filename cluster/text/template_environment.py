"""The jinja2 environment that chat templates render in: transformers' own, in which the text that the template itself
writes can be told from the client's.

Text and string constants of the template become `TemplateText` where its code is generated, and stay so through what
templates do to strings. Imports only the standard library and jinja2, so that the child that renders starts fast."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import sync_do_join
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isotherm.cluster.text.template_text import TemplateText, joined, written


class _OwnTextGenerator(CodeGenerator):
    """Writes a template's constants as names of the generated module, which are set once, at its end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._names: dict[str, str] = {}

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        super().visit_Template(node, frame)
        self._indentation = 0
        self.writeline("own_text = environment.own_text")
        for text, name in self._names.items():
            self.writeline(f"{name} = own_text({text!r})")

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        self.write(self._source(node.as_const(frame.eval_ctx)))

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_TemplateData(node, frame)
        else:
            self.write(self._source(node.data))

    @optimizeconst
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("concat(map(str, (")
        for arg in node.nodes:
            self.visit(arg, frame)
            self.write(", ")
        self.write(")))")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return self._source("".join(group))

    def _source(self, value: Any) -> str:
        """Python that makes the constant."""
        if type(value) is str:
            return self._names.setdefault(value, f"own_{len(self._names)}")
        if type(value) is list:
            return f"[{', '.join(map(self._source, value))}]"
        if type(value) is tuple:
            return f"({''.join(f'{self._source(item)}, ' for item in value)})"
        if type(value) is dict:
            return f"{{{', '.join(f'{self._source(key)}: {self._source(item)}' for key, item in value.items())}}}"
        return str(value) if isinstance(value, float) else repr(value)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """What transformers' `apply_chat_template` renders in (transformers/utils/chat_template_utils.py)."""

    code_generator_class = _OwnTextGenerator
    concat: Callable[[Iterable[str]], str] = staticmethod(joined)
    own_text = staticmethod(written)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters["join"] = _join
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's tokens for training (transformers). When serving, only its body counts,
    which is a scope of its own there."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, >, & and ' for HTML, which a model never saw in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_eval_context
def _join(eval_ctx: EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    # A plain separator would make plain text of what it joins.
    return sync_do_join(eval_ctx, value, TemplateText(d) if type(d) is str else d, attribute)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
