"""A file as clients upload it: one multipart form, whose size is counted while it comes in."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from isotherm.cluster.api.access.caller import caller_of
from isotherm.cluster.api.batches.disk import refused_when_full
from isotherm.cluster.api.batches.space import Hold
from isotherm.cluster.api.batches.store import Store
from isotherm.cluster.api.coding import too_large
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.jsontypes import JSON

_FORM_BYTES = 16 * 1024  # of what stands around the file
_AHEAD = 8 << 20  # bytes for which room is held before they come, where a body does not say how long it is
_LONGEST_NAME = 255
_KEEP = range(3600, 2592000 + 1)  # seconds, as OpenAI allows


@dataclass(frozen=True)
class _Form:
    file: UploadFile
    name: str
    purpose: str
    keep: int | None


async def receive_file(request: Request, store: Store, max_file_bytes: int) -> JSON:
    """The file that the request's form brings, stored. Raises ReplyError."""
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        raise ReplyError(
            f"content-encoding: {coding[:100]!r} is not taken for a file", status=415, param="content-encoding"
        )
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data" or "boundary=" not in kind:
        raise ReplyError(
            f"content-type: expected multipart/form-data with a boundary, got {kind[:100]!r}",
            status=415,
            param="content-type",
        )
    length = request.headers.get("content-length", "0")
    wanted = int(length[:20]) if length.isdecimal() else 0
    if wanted > max_file_bytes + _FORM_BYTES:
        raise too_large(max_file_bytes)
    owner = caller_of(request).name
    with refused_when_full("the file"), store.space.hold(owner) as hold:
        await run_in_threadpool(hold.grow, wanted)
        return await _received(request, _counted(request, max_file_bytes + _FORM_BYTES, hold), store, owner)


async def _received(request: Request, body: AsyncGenerator[bytes, None], store: Store, owner: str) -> JSON:
    parser = MultiPartParser(request.headers, body, max_files=1, max_fields=16, max_part_size=4096)
    try:
        data = await parser.parse()
    except MultiPartException as error:
        raise ReplyError(f"the form cannot be read: {error.message}") from None
    except (KeyError, ValueError) as error:  # a form without a boundary, a name or a charset that is one
        raise ReplyError(f"the form cannot be read: {error}") from None
    try:
        return await run_in_threadpool(_store, _checked(data), store, owner)
    finally:
        await data.close()


async def _counted(request: Request, limit: int, hold: Hold) -> AsyncGenerator[bytes, None]:
    """The body's parts, for which there is room: of one that does not say how long it is, as it comes."""
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large(limit)
        if size > hold.size:
            await run_in_threadpool(hold.grow, size, min(size + _AHEAD, limit))
        yield part


def _checked(data: FormData) -> _Form:
    purpose, file = data.get("purpose"), data.get("file")
    if not isinstance(file, UploadFile):
        raise ReplyError("file: this field is required, as a file with a name", param="file")
    if purpose != "batch":
        shown = "nothing" if purpose is None else repr(str(purpose)[:100])
        raise ReplyError(f"purpose: expected 'batch', got {shown}", param="purpose")
    anchor, seconds = data.get("expires_after[anchor]"), data.get("expires_after[seconds]")
    if anchor not in (None, "created_at"):
        raise ReplyError("expires_after.anchor: expected 'created_at'", param="expires_after.anchor")
    keep = None
    if seconds is not None:
        text = str(seconds)
        keep = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
        if keep not in _KEEP:
            raise ReplyError(
                f"expires_after.seconds: expected {_KEEP[0]} to {_KEEP[-1]}, got {text[:20]!r}",
                param="expires_after.seconds",
            )
    name = Path(file.filename or "").name or "upload.jsonl"
    return _Form(file, name.encode("utf-8", "replace").decode()[:_LONGEST_NAME], "batch", keep)


def _store(form: _Form, store: Store, owner: str) -> JSON:
    path = store.new_upload()
    try:
        source: BinaryIO = form.file.file
        source.seek(0)
        with open(path, "xb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        return store.add_file(path, form.name, form.purpose, form.keep, owner=owner)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
