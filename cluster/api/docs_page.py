"""The page /docs: an OpenAPI document as HTML, without scripts and without anything from elsewhere. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from isotherm.cluster.jsontypes import JSON

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
details { border: 1px solid #ddd; border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; } code { font: 13px ui-monospace, monospace; }
.method { display: inline-block; width: 4.5rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
td, th { text-align: left; vertical-align: top; border-top: 1px solid #eee; padding: .25rem .5rem .25rem 0; }
.refused { color: #888; }
@media (prefers-color-scheme: dark) {
  body { background: #161616; color: #ddd; } details, td, th { border-color: #333; } a { color: #8bf; }
}
"""


def page(document: JSON) -> str:
    """The whole page."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    operations = "".join(
        _operation(document, path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    schemas = "".join(_schema(document, name, schema) for name, schema in document["components"]["schemas"].items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1><p>As data: <a href="openapi.json">openapi.json</a></p>{operations}'
        f"<h2>Bodies</h2>{schemas}</html>"
    )


def _operation(document: JSON, path: str, method: str, operation: JSON) -> str:
    parts = []
    if parameters := operation.get("parameters"):
        rows = ((one["name"], one["in"], "") for one in parameters)
        parts.append(_table(("parameter", "where", ""), rows))
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Takes <code>{escape(kind)}</code>: {_type(body['schema'])}</p>")
    for status, reply in operation["responses"].items():
        kinds = ", ".join(
            f"<code>{escape(kind)}</code>: {_type(one['schema'])}" for kind, one in reply["content"].items()
        )
        parts.append(f"<p>{escape(status)}, {escape(reply['description'])}: {kinds}</p>")
    head = f'<span class="method">{method.upper()}</span><code>{escape(path)}</code> {escape(operation["summary"])}'
    return f"<details><summary>{head}</summary>{''.join(parts)}</details>"


def _schema(document: JSON, name: str, schema: JSON) -> str:
    required = schema.get("required", [])
    properties = schema.get("properties", {})
    served = [(field, one) for field, one in properties.items() if not _is_refused(one)]
    refused = sorted(field for field, one in properties.items() if _is_refused(one))
    rows = (
        (field + (" (required)" if field in required else ""), _type(one), escape(_limits(one)))
        for field, one in served
    )
    about = f"<p>{escape(schema['description'])}</p>" if "description" in schema else ""
    fields = _table(("field", "type", "limits"), rows) if served else f"<p>{_type(schema)}</p>"
    others = f'<p class="refused">Refused by name: <code>{escape(", ".join(refused))}</code></p>' if refused else ""
    head = f'<summary id="{escape(name)}"><code>{escape(name)}</code></summary>'
    return f"<details>{head}{about}{fields}{others}</details>"


def _is_refused(schema: JSON) -> bool:
    return str(schema.get("description", "")).startswith("refused")


def _table(head: tuple[str, str, str], rows: Iterator[tuple[str, str, str]]) -> str:
    """The second and third of each row are HTML."""
    body = "".join(f"<tr><td><code>{escape(name)}</code><td>{second}<td>{third}" for name, second, third in rows)
    return f"<table><tr>{''.join(f'<th>{escape(name)}' for name in head)}{body}</table>"


def _type(schema: JSON) -> str:
    """A schema in a few words, with links to those that have a name. HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[key]))
    if "enum" in schema:
        return escape(" or ".join(json.dumps(value) for value in schema["enum"]))
    if "const" in schema:
        return escape(json.dumps(schema["const"]))
    kind: Any = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(" or ".join(kind) if isinstance(kind, list) else str(kind))


_LIMITS = {
    "minimum": "from {}", "exclusiveMinimum": "over {}", "maximum": "to {}", "exclusiveMaximum": "under {}",
    "minLength": "at least {} characters", "maxLength": "at most {} characters", "minItems": "at least {} entries",
    "maxItems": "at most {} entries", "maxProperties": "at most {} entries", "pattern": "matches {}",
}  # fmt: skip


def _limits(schema: JSON) -> str:
    """What a value must keep to, wherever it is said."""
    parts = [schema, *(one for key in ("anyOf", "oneOf") for one in schema.get(key, []))]
    said = [words.format(part[key]) for part in parts for key, words in _LIMITS.items() if key in part]
    return ", ".join(dict.fromkeys(said))
