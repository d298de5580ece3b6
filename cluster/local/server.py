"""A model served in threads of this process, at a Unix socket that is this process's alone: no port, no Ray. HTTP all
the same, so that streams, disconnects and errors are what they are elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import uvicorn

from isotherm.actors.local import local_engine
from isotherm.actors.models.weights import own_fingerprint, parse_dtype
from isotherm.cluster.api.slow_clients import SlowClientMiddleware
from isotherm.cluster.background import spawn_thread
from isotherm.cluster.front_door import front_door
from isotherm.cluster.local.engine import LocalEngine
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.observe.alone import Alone
from isotherm.cluster.observe.ingress import IngressObserver
from isotherm.cluster.served_model import served_model
from isotherm.kernels.select import select_kernels

log = logging.getLogger(__name__)
END_SECONDS = 5.0  # for open connections to end
_NO_BATCHES = (
    "a model that is served within a process keeps no files; `isotherm serve` does, and Client.batch needs none"
)


class InProcessServer:
    """Listens when it is made. `socket` is the path of its Unix socket, in this process."""

    def __init__(self, make: Callable[[], tuple[LocalEngine, uvicorn.Server]]) -> None:
        with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as ends:
            self.socket = _bound(listening, ends)
            run = _Run(make, listening.dup())
            ends.callback(run.stop)
            self._end = weakref.finalize(self, ends.pop_all().close)  # at the process's end too
        try:
            run.wait_started()
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """End the server, its open requests and its engine; once."""
        self._end()


class _Run:
    """The front door's thread and event loop."""

    def __init__(self, make: Callable[[], tuple[LocalEngine, uvicorn.Server]], listening: socket.socket) -> None:
        self._make, self._listening = make, listening
        self._started = threading.Event()
        self._error: Exception | None = None
        self._stop: Callable[[], None] = lambda: None
        self.thread = spawn_thread("front door", self._work, vital=False)

    def wait_started(self) -> None:
        """Raises what kept it from starting."""
        self._started.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self._stop()
        self.thread.join(2 * END_SECONDS)

    def _work(self) -> None:
        try:
            with self._listening:
                asyncio.run(self._serve())
        except Exception as error:
            if self._started.is_set():
                raise
            self._error = error  # of whoever waits for it
        finally:
            self._started.set()

    async def _serve(self) -> None:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        engine, server = self._make()
        try:
            self._listening.listen()
            serving = asyncio.ensure_future(server.serve(sockets=[self._listening]))
            stopping = asyncio.ensure_future(stopped.wait())
            self._stop = lambda: _unless_closed(loop, stopped.set)
            self._started.set()  # who connects now is accepted in a moment
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            engine.close()  # first: what is open ends with words
            server.should_exit = True
        stopping.cancel()
        await serving


def _unless_closed(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)


def _bound(listening: socket.socket, ends: contextlib.ExitStack) -> str:
    """The path by which this process reaches the socket, and nobody else. On Linux it leads to the socket itself, whose
    folder is gone by then: a signal that ends this process while it loads or serves leaves nothing behind. `ends` gets
    what is to be done when it is over."""
    folder = tempfile.mkdtemp(prefix="isotherm-")  # for this user only
    with contextlib.ExitStack() as made:
        made.callback(shutil.rmtree, folder, ignore_errors=True)
        path = str(Path(folder) / "http")
        listening.bind(path)
        if sys.platform.startswith("linux"):
            held = os.open(path, os.O_PATH | os.O_CLOEXEC)
            ends.callback(os.close, held)
            return f"/proc/self/fd/{held}"
        ends.push(made.pop_all())
        return path


def serve_in_process(model: str) -> InProcessServer:
    """MODEL|MANIFEST, served by this process when this returns. Raises ManifestError, ModelNotFoundError,
    CheckpointError and what else keeps a model from being served."""
    # Whoever reaches the socket is this machine's user, though no address says so.
    manifest, path = served_model(model, admin="open", metrics="open")
    return InProcessServer(lambda: _made(manifest, path))


def _made(manifest: Manifest, path: Path) -> tuple[LocalEngine, uvicorn.Server]:
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    selection = select_kernels(manifest.kernels, parse_dtype(manifest.dtype), device=manifest.device, isa=manifest.isa)
    kernels = selection.kernels
    log.info("kernels: %s", selection.reason)
    wished = manifest.speculation
    checkpoint, kind = checkpoint.drafting(wished.kind)
    scheduler = manifest.scheduler_config(checkpoint.config)
    choice, kept = manifest.weights.choice, manifest.engine.kv_cache_dtype
    engine = local_engine(
        checkpoint, kernels, scheduler, choice=choice, speculation=kind, tokens=wished.tokens, kv_cache_dtype=kept
    )
    digest = own_fingerprint(checkpoint, kernels, choice, kept).digest
    client = LocalEngine(engine, config.vocab_size, digest, selection.reason)
    try:
        alone = Alone(client.meter, lambda: client.not_ready() is None)
        observer = IngressObserver.of(manifest, "local", alone, logs=False)
        app = front_door(
            manifest, path, client, batches_refused=_NO_BATCHES, observer=observer, ends=lambda: client.closed
        )
    except BaseException:
        client.close()  # else its thread keeps the weights
        raise
    # Logging is set up by the process's own program, if at all.
    served = uvicorn.Config(
        SlowClientMiddleware(app),
        lifespan="off",
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=int(END_SECONDS),
    )
    return client, uvicorn.Server(served)
