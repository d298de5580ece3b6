"""What /openapi.json says: the application's own routes, the bodies that they check, and the form of errors. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute, Route

from isotherm.cluster.jsontypes import JSON

_REF = "#/components/schemas/{model}"
_ROOM = "isotherm__cluster__api__bodies__"  # before names that two bodies have
_JSON_OBJECT: JSON = {"type": "object"}
ERROR: JSON = {
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
    error: str = "Error"  # the name of the schema of its errors
    raw: bool = False  # the body is checked by what it asks for, not here


def document(
    routes: Iterable[BaseRoute],
    described: Mapping[tuple[str, str], Described],
    errors: Mapping[str, JSON],
    title: str,
    version: str,
) -> JSON:
    """The OpenAPI document of these routes; `described` by method and path, `errors` by the names of their schemas. A
    route that nobody has described is in it all the same."""
    found = [
        (route, method, described.get((method, route.path), Described("")))
        for route in routes
        if isinstance(route, Route)
        for method in sorted((route.methods or set()) - {"HEAD"})
    ]
    bodies, schemas = _schemas(dict.fromkeys(model for _, _, about in found for model in about.bodies))
    paths: JSON = {}
    for route, method, about in found:
        paths.setdefault(route.path_format, {})[method.lower()] = _operation(route, method, about, bodies)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": {**errors, **schemas}},
    }


def _operation(route: Route, method: str, about: Described, bodies: Mapping[type[BaseModel], JSON]) -> JSON:
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
                "content": {"application/json": {"schema": {"$ref": _REF.format(model=about.error)}}},
            },
        },
    }
    if path or query:
        operation["parameters"] = [*path, *query]
    content = _content(about, bodies)
    if content is not None:
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _content(about: Described, bodies: Mapping[type[BaseModel], JSON]) -> JSON | None:
    if about.form is not None:
        return {"multipart/form-data": {"schema": about.form}}
    if about.raw:
        return {"application/json": {"schema": _JSON_OBJECT}}
    if not about.bodies:
        return None
    references = [bodies[model] for model in about.bodies]
    return {"application/json": {"schema": references[0] if len(references) == 1 else {"anyOf": references}}}


def _schemas(models: Iterable[type[BaseModel]]) -> tuple[dict[type[BaseModel], JSON], JSON]:
    """The reference to each body's schema, and the schemas of bodies and of all that they are made of, by name."""
    models = list(models)
    keys, made = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    schemas: JSON = _plain(made.get("$defs", {}))
    references = {model: _plain(keys[model, "validation"]) for model in models}
    for model, reference in references.items():
        properties = schemas[reference["$ref"].rsplit("/", 1)[-1]]["properties"]
        properties.update(_other_fields(model, properties))
    return references, schemas


def _plain(schema: Any) -> Any:
    """pydantic's schema, with short names, and with `anyOf` where which member is meant is told by a function: others
    may fit too."""
    if isinstance(schema, dict):
        return {("anyOf" if key == "oneOf" else key.removeprefix(_ROOM)): _plain(one) for key, one in schema.items()}
    if isinstance(schema, list):
        return [_plain(one) for one in schema]
    return schema.replace(_ROOM, "") if isinstance(schema, str) else schema


def _other_fields(model: type[BaseModel], properties: JSON) -> JSON:
    """The fields that a body knows and does not have: refused, or of no effect."""
    neutral: Mapping[str, Sequence[Any]] = getattr(model, "neutral", {})
    refused = {name: _refused(values) for name, values in neutral.items()}
    older: Mapping[str, str] = getattr(model, "older", {})
    instead = {**{name: f"give {here}" for name, here in older.items()}, **getattr(model, "renamed", {})}
    renamed = {name: {"description": f"refused: {here or 'no field of this route'}"} for name, here in instead.items()}
    harmless: Mapping[str, str] = getattr(model, "harmless", {})
    idle = {name: {"description": f"of no effect: {why}"} for name, why in harmless.items() if name not in properties}
    return {**refused, **renamed, **idle}


def _refused(neutral: Sequence[Any]) -> JSON:
    """A field that is refused, unless it asks for nothing."""
    allowed = [*neutral, None]
    said = " or ".join(json.dumps(value) for value in allowed)
    return {"enum": allowed, "description": f"refused: not served, and taken as {said} only"}
