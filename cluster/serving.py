"""`isotherm serve`: controller, workers and ingress up, wait, everything down again."""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from isotherm.cluster.controller import Controller, Owner
from isotherm.cluster.ingress import ingress_application
from isotherm.cluster.manifest import Manifest
from isotherm.cluster.ray_session import attach, running_controller, start_local
from isotherm.cluster.ray_workers import CONTROLLER, NAMESPACE, ON_HEAD, find_controller
from isotherm.cluster.run_file import run_file

APPLICATION = "isotherm"
POLL = 0.3  # seconds between looks at loading progress
STOP_TIMEOUT = 60.0  # seconds that `isotherm stop` waits for everything to be gone


class ServeError(RuntimeError):
    """The cluster could not be started."""


def start_controller(manifest: Manifest, model_path: Path, owner: Owner | None) -> Any:
    """The detached controller actor; its workers are not started yet. `owner` is the process that waits for `wait_stopped`; None where there is
    none. Raises ServeError where a controller runs already."""
    try:
        find_controller()
    except ValueError:
        pass
    else:
        raise ServeError("an Isotherm cluster runs on this Ray already; end it with: isotherm stop")
    address = ray._private.worker.get_dashboard_url()
    # Ray starts it again when it dies, and makes the calls once more that it has not answered.
    options = {"max_restarts": -1, "max_task_retries": -1, "num_cpus": 0, "resources": ON_HEAD}
    return ray.remote(Controller).options(name=CONTROLLER, namespace=NAMESPACE, lifetime="detached", **options).remote(
        uuid.uuid4().hex[:12], manifest, str(model_path), owner, f"http://{address}" if address else None
    )


def start_ingress(manifest: Manifest, model_path: Path) -> None:
    serve.start(http_options={"host": manifest.http.host, "port": manifest.http.port})
    serve.run(ingress_application(manifest, model_path), name=APPLICATION, route_prefix="/")


def stop_everything() -> None:
    """Ingress, workers and controller, in this order. Ray itself stays."""
    with redirect_stdout(io.StringIO()):  # Ray prints there that Serve's controller is gone, as if that were an error
        serve.shutdown()
        try:
            controller = find_controller()
        except ValueError:
            return
        try:
            ray.get(controller.stop.remote(), timeout=30)
        finally:
            ray.kill(controller)


def serve_until_stopped(manifest: Manifest, model_path: Path, address: str | None, console: Console) -> None:
    """Blocks until Ctrl-C, SIGTERM or `isotherm stop`. With an address, joins that Ray; else starts a local one and ends it."""
    for name in ("ray", "ray.serve"):  # Serve's logger has a level of its own
        logging.getLogger(name).setLevel(logging.WARNING)
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop.on_signal)
    signal.signal(signal.SIGINT, stop.on_signal)
    console.print("starting Ray" if address is None else f"joining Ray at {address}")
    with _local_ray() if address is None else _joined_ray(address):
        try:
            _serve(manifest, model_path, stop, console)
        except (RayActorError, RayTaskError) as error:
            raise ServeError(_cause(error)) from None


@contextmanager
def _joined_ray(address: str) -> Iterator[None]:
    attach(address)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _local_ray() -> Iterator[None]:
    """Ray's folder goes with it, unless there was an error that its logs may explain."""
    folder = tempfile.mkdtemp(prefix="isotherm-")
    keep = False
    try:
        start_local(folder)
        with run_file(ray.get_runtime_context().gcs_address):
            yield
    except Exception as error:
        keep = True
        raise ServeError(f"{error}\nRay's logs are in {folder}/session_latest/logs") from error
    finally:
        ray.shutdown()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


class _Interrupted(Exception):
    """A signal came while something blocked."""


class _Stop(threading.Event):
    """Set by a signal, which also ends what runs in `until_set`."""

    _blocking = False

    def on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        self.set()
        if self._blocking:
            self._blocking = False
            raise _Interrupted

    def until_set(self, work: Callable[[], None]) -> None:
        """Run `work` on the main thread; it is left half done when the signal comes, and not begun when it has come."""
        try:
            self._blocking = True
            if not self.is_set():
                work()
        except Exception:
            if not self.is_set():  # Ray's compiled parts turn the interruption into errors of their own
                raise
        finally:
            self._blocking = False


def _serve(manifest: Manifest, model_path: Path, stop: _Stop, console: Console) -> None:
    controller = start_controller(manifest, model_path, Owner(socket.gethostname(), os.getpid()))
    try:
        starting = controller.start.remote()
        stop.until_set(lambda: start_ingress(manifest, model_path))
        _show_loading(controller, starting, stop, console)
        if not stop.is_set():
            _announce(manifest, console)
        stopped = controller.wait_stopped.remote()
        while not stop.is_set() and not ray.wait([stopped], timeout=0.5)[0]:
            pass
    finally:
        try:
            console.print("stopping")
        finally:  # also where nobody reads what is printed any more
            stop_everything()


def _cause(error: Exception) -> str:
    """The last line of a remote traceback that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else repr(error))


def stop_running(address: str | None) -> None:
    """End the cluster at a Ray address, as `isotherm stop` does, and wait until it is gone. Raises NoClusterError."""
    attach(address)
    try:
        controller = running_controller()
        owner = ray.get(controller.owner.remote(), timeout=30)
        if owner is None:
            raise ServeError("this cluster belongs to a RayService, which would start it again; end it with: kubectl delete rayservice NAME")
        ray.get(controller.stop.remote(), timeout=60)
        # The process that serves sees this and ends the ingress, the controller, and Ray where it started it.
        deadline = time.monotonic() + STOP_TIMEOUT
        while time.monotonic() < deadline and _runs(controller):
            time.sleep(0.2)
    finally:
        ray.shutdown()
    while time.monotonic() < deadline and owner.host == socket.gethostname() and Path(f"/proc/{owner.pid}").exists():
        time.sleep(0.1)


def _runs(controller: Any) -> bool:
    try:
        ray.get(controller.owner.remote(), timeout=5)
    except RayError:
        return False
    return True


def _show_loading(controller: Any, starting: Any, stop: threading.Event, console: Console) -> None:
    """Progress of every worker until all have loaded. Raises what `Controller.start` raised."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}
        phase = ""
        while not stop.is_set():
            done = bool(ray.wait([starting], timeout=POLL)[0])
            if done:
                ray.get(starting)
            status = ray.get(controller.status.remote())
            if status["controller"]["phase"] != phase:
                phase = status["controller"]["phase"]
                console.print(phase, markup=False, highlight=False)
            for worker in status["workers"]:
                if worker["id"] not in tasks:
                    tasks[worker["id"]] = progress.add_task(f"loading {worker['id']}", total=1.0)
                progress.update(tasks[worker["id"]], completed=worker.get("progress", 0.0))
            if done:
                return


def _announce(manifest: Manifest, console: Console) -> None:
    url = f"http://{manifest.http.host}:{manifest.http.port}"
    console.print(f"[bold green]ready[/]  {escape(manifest.model_id)} at {url}/v1   (Ctrl-C ends it)")
    console.print(
        f"""  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{{"model": "{manifest.model_id}", "messages": [{{"role": "user", "content": "What is 3 + 4?"}}]}}'""",
        highlight=False,
        markup=False,
    )
