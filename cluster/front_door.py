"""The front door as a manifest has it, over an engine wherever that runs: behind Ray actors, or in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from starlette.applications import Starlette

from isotherm.cluster.api.access.key_store import KeyStore
from isotherm.cluster.api.access.reach import Access
from isotherm.cluster.api.admin import AdminClient
from isotherm.cluster.api.app import build_app
from isotherm.cluster.api.batches.service import BatchService
from isotherm.cluster.api.engine_client import EngineClient
from isotherm.cluster.api.observed import Observer
from isotherm.cluster.api.response_store import ResponseStore
from isotherm.cluster.api.settings import AppSettings
from isotherm.cluster.background import spawn_thread
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.model.generation import generation_defaults
from isotherm.cluster.text.chat_template import ChatTemplate
from isotherm.cluster.text.chat_trouble import chat_trouble
from isotherm.cluster.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def front_door(
    manifest: Manifest,
    model_path: Path,
    engine: EngineClient,
    admin: AdminClient | None = None,
    store: ResponseStore | None = None,
    batches: BatchService | None = None,
    batches_refused: str = "",
    observer: Observer | None = None,
    keys: KeyStore | None = None,
    ends: Callable[[], bool] = lambda: False,
) -> Starlette:
    """The ASGI application that serves a manifest's model; with `admin`, the operator's routes too. `store` keeps
    responses where this process's memory will not do. `batches` runs files of requests; without it, clients are told
    `batches_refused`. With an `observer` there are metrics; with `keys` every client needs one of them. `ends`: whether
    this server is about to end. Reads the checkpoint's tokenizer and defaults. Raises TokenizerError,
    ModelConfigError."""
    defaults = generation_defaults(model_path) if manifest.generation_config == "auto" else {}
    if manifest.logprobs == "processed":
        defaults["processed_logprobs"] = True
    settings = AppSettings(
        access=Access(manifest.http.admin, manifest.http.metrics),
        keys=keys,
        defaults=defaults,
        tool_format=manifest.tool_format,
        cors=tuple(manifest.http.cors),
        batches_refused=batches_refused,
        kept_response_bytes=manifest.http.kept_responses,
        request_timeout_s=manifest.http.request_timeout,
        shared_prefix_cache=manifest.engine.shared_prefix_cache,
    )
    tokenizer = Tokenizer.load(model_path, control_tokens_anywhere=manifest.control_tokens == "anywhere")
    if tokenizer.chat_template is not None:  # beside the start, which waits for no template
        spawn_thread("chat templates", partial(_warn, tokenizer.chat_template), vital=False)
    return build_app(
        engine,
        tokenizer,
        manifest.model_id,
        manifest.http.aliases,
        settings,
        admin,
        store,
        batches,
        observer=observer,
        ends=ends,
    )


def _warn(template: ChatTemplate) -> None:
    for words in chat_trouble(template):
        log.warning("chats: %s", words)
