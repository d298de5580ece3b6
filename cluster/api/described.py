"""What /openapi.json and /docs say of each route that cannot be read off it, and these two routes."""

from __future__ import annotations

import importlib.metadata

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from isotherm.cluster.api.batches.routes import BatchBody
from isotherm.cluster.api.bodies.chat import ChatBody
from isotherm.cluster.api.bodies.completion import CompletionBody
from isotherm.cluster.api.bodies.messages import Conversation, MessagesBody
from isotherm.cluster.api.bodies.responses import ResponsesBody
from isotherm.cluster.api.bodies.tokenization import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from isotherm.cluster.api.docs_page import page
from isotherm.cluster.api.openapi import ERROR, Described, document
from isotherm.cluster.api.replies import json_response
from isotherm.cluster.jsontypes import JSON

_TEXT: JSON = {"type": "string"}


def _object(*required: str, **properties: JSON) -> dict[str, JSON]:
    return {"application/json": {"type": "object", "required": list(required), "properties": properties}}


def _list_of(*required: str) -> dict[str, JSON]:
    return _object("object", "data", data={"type": "array", "items": {"type": "object", "required": list(required)}})


def _generated(*required: str) -> dict[str, JSON]:
    return {**_object(*required), "text/event-stream": {"type": "string"}}


_FILE = ("id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status")
_BATCH = ("id", "object", "endpoint", "input_file_id", "completion_window", "status", "created_at", "request_counts")
_REPLY = ("id", "object", "created", "model", "choices", "usage")
_MODEL = ("id", "object", "created", "owned_by", "root", "max_model_len", "vocab_size", "default_sampling")
_RESPONSE = ("id", "object", "created_at", "model", "status", "output", "usage")
_MESSAGE = ("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage")
_ANTHROPIC_ERROR: JSON = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": _TEXT, "message": _TEXT},
        },
    },
}
_UPLOAD: JSON = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "contentMediaType": "application/jsonl", "format": "binary"},
        "purpose": {"enum": ["batch"]},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "string", "pattern": "^[0-9]{4,7}$"},
    },
}

_ERRORS = {"Error": ERROR, "MessagesError": _ANTHROPIC_ERROR}
DESCRIBED: dict[tuple[str, str], Described] = {
    ("POST", "/v1/chat/completions"): Described("The next message of a chat", [ChatBody], _generated(*_REPLY)),
    ("POST", "/v1/completions"): Described("The continuation of a text", [CompletionBody], _generated(*_REPLY)),
    ("POST", "/v1/responses"): Described("A response, OpenAI's way", [ResponsesBody], _generated(*_RESPONSE)),
    ("POST", "/v1/responses/input_tokens"): Described(
        "The tokens of a response's prompt", [ResponsesBody], _object("object", "input_tokens")
    ),
    ("GET", "/v1/responses/{response_id}"): Described("A response that is kept", reply=_object(*_RESPONSE)),
    ("DELETE", "/v1/responses/{response_id}"): Described("Forget a response", reply=_object("id", "object", "deleted")),
    ("POST", "/v1/responses/{response_id}/cancel"): Described("Refused: none is made in the background"),
    ("GET", "/v1/responses/{response_id}/input_items"): Described(
        "What a response that is kept has answered", reply=_list_of(), query=("limit", "order", "after")
    ),
    ("POST", "/v1/messages"): Described(
        "The next message, Anthropic's way", [MessagesBody], _generated(*_MESSAGE), error="MessagesError"
    ),
    ("POST", "/v1/messages/count_tokens"): Described(
        "The tokens of a message's prompt", [Conversation], _object("input_tokens"), error="MessagesError"
    ),
    ("GET", "/v1/models"): Described("The served model, under each of its names", reply=_list_of(*_MODEL)),
    ("GET", "/v1/models/{model:path}"): Described("One name of the served model", reply=_object(*_MODEL)),
    ("POST", "/tokenize"): Described(
        "The token ids of a text, or of a chat", [TokenizeTextBody, TokenizeChatBody],
        _object("count", "max_model_len", "tokens", "token_strs"),
    ),
    ("POST", "/detokenize"): Described("The text of token ids", [DetokenizeBody], _object("prompt", prompt=_TEXT)),
    ("POST", "/v1/files"): Described("Upload the input of a batch", form=_UPLOAD, reply=_object(*_FILE)),
    ("GET", "/v1/files"): Described(
        "The files", reply=_list_of(*_FILE), query=("purpose", "limit", "order", "after")
    ),
    ("GET", "/v1/files/{file_id}"): Described("A file", reply=_object(*_FILE)),
    ("DELETE", "/v1/files/{file_id}"): Described("Delete a file", reply=_object("id", "object", "deleted")),
    ("GET", "/v1/files/{file_id}/content"): Described(
        "What a file holds", reply={"application/octet-stream": {"type": "string"}}
    ),
    ("POST", "/v1/batches"): Described("Run the rows of a file", [BatchBody], _object(*_BATCH)),
    ("GET", "/v1/batches"): Described("The batches", reply=_list_of(*_BATCH), query=("limit", "after")),
    ("GET", "/v1/batches/{batch_id}"): Described("A batch", reply=_object(*_BATCH)),
    ("POST", "/v1/batches/{batch_id}/cancel"): Described("End a batch", reply=_object(*_BATCH)),
    ("GET", "/health"): Described("Whether this server lives", reply=_object("status")),
    ("GET", "/ready"): Described("Whether requests can be served", reply=_object("status")),
    ("GET", "/status"): Described("The cluster, for its operator", reply=_object()),
    ("GET", "/version"): Described("Isotherm's version", reply=_object("version", version=_TEXT)),
    ("GET", "/admin/operations"): Described("Operations so far", reply=_object("operations")),
    ("POST", "/admin/operations"): Described("Change the cluster", raw=True, reply=_object(), status=202),
    ("GET", "/admin/operations/{id}"): Described("An operation", reply=_object()),
    ("GET", "/admin/experts"): Described("The load and the holders of every expert", reply=_object()),
    ("GET", "/admin/autoscaler"): Described("What the autoscaler did, and why", reply=_object()),
    ("POST", "/admin/autoscaler"): Described("Change the autoscaler's mode", raw=True, reply=_object("mode")),
    ("GET", "/admin/events"): Described("What happens in the cluster", reply={"text/event-stream": _TEXT}),
    ("GET", "/admin/requests"): Described("Open and recent requests", reply=_object("running", "recent")),
    ("GET", "/metrics"): Described("Prometheus' metrics", reply={"text/plain": _TEXT}),
    ("GET", "/openapi.json"): Described("This description", reply=_object("openapi", "paths")),
    ("GET", "/"): Described("The page", reply={"text/html": _TEXT}),
    ("GET", "/page/{name}"): Described("A file of the page", reply={"text/javascript": _TEXT}),
    ("GET", "/docs"): Described("This description as a page", reply={"text/html": _TEXT}),
}  # fmt: skip


def described_routes() -> list[Route]:
    """/openapi.json and /docs, of the application that has them."""

    def description(request: Request) -> JSON:
        version = importlib.metadata.version("isotherm")
        return document(request.app.routes, DESCRIBED, _ERRORS, "Isotherm", version)

    async def openapi(request: Request) -> Response:
        return json_response(description(request))

    async def docs(request: Request) -> Response:
        policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(page(description(request)), headers=policy)

    return [Route("/openapi.json", openapi), Route("/docs", docs)]
