"""What can be known to be wrong before anything is started. Imports no Ray: it runs before Ray's environment is set."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable
from pathlib import Path

from isotherm.cluster.manifest import Manifest, ManifestError
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.generation import generation_defaults
from isotherm.cluster.text.tokenizer import Tokenizer


def check_servable(manifest: Manifest, path: Path, cuda_unavailable: Callable[[], str | None] | None = None) -> None:
    """Whether the manifest can be served with the model in `path`. Reads headers, no weights. `cuda_unavailable` says
    why this machine has no GPU, where its workers will run; it is asked only where the manifest wants one. Raises
    ManifestError, ModelConfigError, CheckpointError or TokenizerError."""
    check_devices(manifest)
    if manifest.device == "cuda" and cuda_unavailable is not None and (reason := cuda_unavailable()) is not None:
        raise ManifestError(f"device is cuda, but {reason}; or use device: cpu")
    manifest.scheduler_config(Checkpoint.open(path).drafting(manifest.speculation.kind)[0].config)
    Tokenizer.load(path)
    if manifest.generation_config == "auto":
        generation_defaults(path)


def check_devices(manifest: Manifest) -> None:
    """Whether devices, kernels and reserved GPUs go together. Raises ManifestError."""
    if manifest.isa != "auto" and manifest.kernels in ("reference", "triton"):
        raise ManifestError(f"isa is {manifest.isa}, which is for native kernels, but kernels is {manifest.kernels}")
    gpus = {"attention": manifest.attention.gpus, "experts": manifest.experts.gpus}
    if manifest.device == "cpu":
        if manifest.kernels == "triton":
            raise ManifestError("kernels is triton, which needs device: cuda")
        return
    if not any(gpus.values()):
        raise ManifestError("device is cuda, but no worker reserves a GPU; set attention.gpus or experts.gpus")
    if manifest.kernels in ("native", "reference"):
        raise ManifestError(
            f"kernels is {manifest.kernels}, which computes on the CPU; with device: cuda it must be auto or triton"
        )
    if manifest.kernels == "triton" and (without := [section for section, count in gpus.items() if not count]):
        raise ManifestError(
            f"kernels is triton, but {without[0]}.gpus is 0; auto takes triton for the workers with GPUs alone"
        )


def check_port(host: str, port: int) -> None:
    """Whether this machine can listen there. Raises ManifestError."""
    hold_port(host, port).close()


def hold_port(host: str, port: int) -> socket.socket:
    """A socket that has the port, so that as long as it is open nobody else gets it: Ray's processes ask the system for
    any port, before Serve's proxy listens and while one that died is being started again. It listens to nothing; only
    who asks to share the port (SO_REUSEPORT), as Serve's proxies do, can listen beside it, and then has every
    connection. Raises ManifestError where nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET  # as Serve decides it
    try:
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4]
    except (OSError, UnicodeError) as error:
        raise ManifestError(
            f'http.host is "{host}": it cannot be resolved ({error}); use 127.0.0.1, 0.0.0.0 or a name of this machine'
        ) from None
    try:
        with contextlib.ExitStack() as unfinished:
            held = unfinished.enter_context(socket.socket(family, socket.SOCK_STREAM))
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left a moment ago is free
            held.bind(address)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # now: before, who shares it would not show
            unfinished.pop_all()
    except OSError as error:
        ours = "; or end the cluster that serves there (isotherm stop)" if error.errno == errno.EADDRINUSE else ""
        raise ManifestError(
            f"nothing can listen on {host} port {port}: {error.strerror}. Choose another with --host, --port, or "
            f"http.host and http.port in the manifest{ours}"
        ) from None
    return held
