"""What /openapi.json says: the application's own routes, the bodies that they check, and the form of errors. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.routing import BaseRoute, Route

from isotherm.cluster.jsontypes import JSON

_REF = "#/components/schemas/{model}"
_JSON_OBJECT: JSON = {"type": "object"}
_ERROR: JSON = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "the field that the error is about"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@dataclass(frozen=True)
class Described:
    """What cannot be read off a route. `bodies`: one of them is the request's; `reply`: what a good answer is, by
    content type; `query`: names of parameters, each a text."""

    summary: str
    bodies: Sequence[type[BaseModel]] = ()
    reply: Mapping[str, JSON] | None = None
    status: int = 200
    query: Sequence[str] = ()
    form: JSON | None = None  # of an upload
    raw: bool = False  # the body is checked by what it asks for, not here


def document(
    routes: Iterable[BaseRoute], described: Mapping[tuple[str, str], Described], title: str, version: str
) -> JSON:
    """The OpenAPI document of these routes; `described` by method and path. A route that nobody has described is in it
    all the same."""
    paths: JSON = {}
    schemas: JSON = {"Error": _ERROR}
    for route in routes:
        if not isinstance(route, Route):
            continue
        for method in sorted((route.methods or set()) - {"HEAD"}):
            about = described.get((method, route.path), Described(""))
            paths.setdefault(route.path_format, {})[method.lower()] = _operation(route, method, about, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(route: Route, method: str, about: Described, schemas: JSON) -> JSON:
    path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in route.param_convertors
    ]
    query = [{"name": name, "in": "query", "required": False, "schema": {"type": "string"}} for name in about.query]
    reply = {"application/json": _JSON_OBJECT} if about.reply is None else about.reply
    words = re.findall(r"\w+", route.path_format)
    operation: JSON = {
        "operationId": "_".join([method.lower(), *words]),
        "summary": about.summary,
        "responses": {
            str(about.status): {
                "description": "done",
                "content": {kind: {"schema": schema} for kind, schema in reply.items()},
            },
            "default": {
                "description": "an error",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    if path or query:
        operation["parameters"] = [*path, *query]
    content = _content(about, schemas)
    if content is not None:
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _content(about: Described, schemas: JSON) -> JSON | None:
    if about.form is not None:
        return {"multipart/form-data": {"schema": about.form}}
    if about.raw:
        return {"application/json": {"schema": _JSON_OBJECT}}
    if not about.bodies:
        return None
    names = [_add(model, schemas) for model in about.bodies]
    references = [{"$ref": _REF.format(model=name)} for name in names]
    return {"application/json": {"schema": references[0] if len(references) == 1 else {"anyOf": references}}}


def _add(model: type[BaseModel], schemas: JSON) -> str:
    """The schema of a body, with its refused fields, and of all that it is made of → its name."""
    schema = model.model_json_schema(ref_template=_REF)
    schemas.update(schema.pop("$defs", {}))
    neutral: Mapping[str, Sequence[Any]] = getattr(model, "neutral", {})
    for name, values in neutral.items():
        schema["properties"][name] = _refused(values)
    older: Mapping[str, str] = getattr(model, "older", {})
    for name, newer in older.items():
        schema["properties"][name] = {"description": f"refused: the older form of {newer}"}
    harmless: Mapping[str, str] = getattr(model, "harmless", {})
    for name, why in harmless.items():
        schema["properties"].setdefault(name, {"description": f"of no effect: {why}"})
    schemas[model.__name__] = schema
    return model.__name__


def _refused(neutral: Sequence[Any]) -> JSON:
    """A field that is refused, unless it asks for nothing."""
    allowed = [*neutral, None]
    said = " or ".join(json.dumps(value) for value in allowed)
    return {"enum": allowed, "description": f"refused: not served, and taken as {said} only"}
