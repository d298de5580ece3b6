"""The driver: the process below `isotherm serve` (cluster/supervise/supervisor.py) that holds Ray. Controller, workers
and ingress up, wait, everything down again."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from isotherm.cluster.api.access.key_store import KeySource, parse_key_source, passing_key
from isotherm.cluster.background import spawn_thread
from isotherm.cluster.deploy.announcement import announce
from isotherm.cluster.deploy.capacity import check_resources
from isotherm.cluster.deploy.controller import Controller, Owner
from isotherm.cluster.deploy.first_answer import Asked, wait_for_answer
from isotherm.cluster.deploy.front_door_losses import FrontDoorWatch
from isotherm.cluster.deploy.ingress_start import APPLICATION, start_ingress
from isotherm.cluster.deploy.kept_responses import forget_responses
from isotherm.cluster.deploy.losses import Losses
from isotherm.cluster.deploy.proxy_revival import ProxyRevival
from isotherm.cluster.errors import IsothermError, one_line, without_class
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.manifest import Manifest, ManifestError, human_bytes, parse_manifest
from isotherm.cluster.on_ray.controller_process import CONTROLLER, ON_HEAD, find_controller
from isotherm.cluster.on_ray.handles import ActorHandle, Reference
from isotherm.cluster.on_ray.session import (
    ANSWER_SECONDS,
    ask_controller,
    attach,
    local_processes,
    running_controller,
    start_local,
)
from isotherm.cluster.on_ray.workers import NAMESPACE, pid_of_worker
from isotherm.cluster.supervise.processes import runs_as
from isotherm.cluster.supervise.shutdown import Step, carry_out
from isotherm.cluster.supervise.supervisor import ServeError
from isotherm.cluster.supervise.terminal import outlast_terminal

POLL = 0.3  # seconds between looks at loading progress
LOOK_SECONDS = 0.5  # from one look at what was lost, and whether it is time to end, to the next
TELL_SECONDS = 1.0  # in which the controller says what was lost; else it is asked at the next look
ABSENT_SECONDS = 15.0  # after which `isotherm stop` takes the process that served for gone, and does its work
STOP_TIMEOUT = 120.0  # seconds beyond the drain that `isotherm stop` waits for everything to be gone
DRAIN_SLACK = 10.0  # seconds beyond the drain in which an ingress replica ends by itself; then Serve ends it
# Of the steps of an end. Together they are less than STOP_SECONDS of cluster/supervise/watchdog.py.
INGRESS_SECONDS, FORGET_SECONDS, WORKERS_SECONDS, RAY_SECONDS = 12.0, 5.0, 15.0, 12.0
CONTROLLER_END_SECONDS = WORKERS_SECONDS - 3.0  # in which the controller has ended them; then it is killed
ENDING_SECONDS = 5.0  # in which a controller that is about to end answers


def start_controller(manifest: Manifest, model_path: Path, keys: KeySource | None, owner: Owner | None) -> ActorHandle:
    """The detached controller actor; its workers are not started yet. `keys`: what the front door asks for, whoever
    updates it. `owner` is the process that waits for `wait_stopped`; None where there is none. Raises ServeError where
    a controller runs already."""
    try:
        find_controller()
    except ValueError:
        pass
    else:
        raise ServeError("an Isotherm cluster runs on this Ray already; end it with: isotherm stop")
    address = ray._private.worker.get_dashboard_url()
    # Ray starts it again when it dies, and makes the calls once more that it has not answered.
    options = {"max_restarts": -1, "max_task_retries": -1, "num_cpus": 0, "resources": ON_HEAD}
    return (
        ray.remote(Controller)
        .options(name=CONTROLLER, namespace=NAMESPACE, lifetime="detached", **options)
        .remote(uuid.uuid4().hex[:12], manifest, str(model_path), keys, owner, f"http://{address}" if address else None)
    )


def stop_everything() -> list[str]:
    """Ingress, what it has kept, workers and controller, in this order. Ray itself stays. Gives what went wrong, a line
    each."""
    with redirect_stdout(io.StringIO()):  # Ray prints there that Serve's controller is gone, as if that were an error
        return carry_out(
            [
                Step("ending the ingress", INGRESS_SECONDS, serve.shutdown),
                Step("forgetting kept responses", FORGET_SECONDS, forget_responses),
                Step("ending the workers", WORKERS_SECONDS, _stop_controller),
            ]
        )


def _stop_controller() -> None:
    try:
        controller = find_controller()
    except ValueError:
        return
    try:
        ray.get(controller.stop.remote(), timeout=CONTROLLER_END_SECONDS)
    finally:
        ray.kill(controller)


def drain_ingress(seconds: float, stop: _Stop) -> None:
    """Take the routes away, so that new requests get 503, and wait until the replicas have finished the requests that
    they have, or ended them when `seconds` were over (cluster/api/draining.py)."""
    deadline = time.monotonic() + seconds + DRAIN_SLACK
    serve.delete(APPLICATION, _blocking=False)
    while APPLICATION in serve.status().applications and time.monotonic() < deadline and not stop.at_once:
        time.sleep(0.1)


# --- the process ----------------------------------------------------------------------------------


def main() -> None:
    """The process that cluster/supervise/supervisor.py starts: a job and then words on standard input, messages to the
    file descriptor that is its argument."""
    outlast_terminal()
    words = os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # Ray's processes shall not hold the other end
    messages = int(sys.argv[1])
    os.set_inheritable(messages, False)

    def tell(event: str, **rest: Any) -> None:
        with contextlib.suppress(OSError):  # the supervisor has gone
            os.write(messages, json.dumps({"event": event, **rest}).encode() + b"\n")

    job = json.loads(words.readline())
    for name in ("ray", "ray.serve"):  # Serve's logger has a level of its own
        logging.getLogger(name).setLevel(logging.WARNING)
    stop = _Stop()
    signal.signal(signal.SIGINT, stop.on_signal)
    spawn_thread("words of the supervisor", lambda: stop.listen(words), vital=False)
    try:
        _run(job, stop, tell)
    except Exception as error:
        if not stop.at_once:
            if not isinstance(error, IsothermError | OSError | RayError):
                logging.exception("a bug")
            known = isinstance(error, ManifestError)  # Ray's logs say no more about it
            remote = isinstance(error, RayError)  # it says where, in many lines
            reason = without_class(one_line(error)) if remote else str(error) or repr(error)
            tell("failed", reason=reason, logs=not known)
    # Python's own way out would end Ray once more, and wait for threads that hang.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _Stop:
    """Asked to stop: by a word of the supervisor, or because it has gone. Also ends what runs in `until_set`. One more
    word asks for no end: to look after Serve's proxy."""

    def __init__(self) -> None:
        self.asked = self.at_once = False
        self._blocking = False
        self._proxy = ProxyRevival()

    def listen(self, words: Iterable[str]) -> None:
        for word in map(str.strip, words):
            if word == "look":
                self._proxy.look()
            else:
                self._ask(at_once=word != "drain")
        self._ask(at_once=True)

    def _ask(self, at_once: bool) -> None:
        self.at_once |= at_once
        self.asked = True
        os.kill(os.getpid(), signal.SIGINT)  # the main thread may be blocked

    def on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        if self.asked and self._blocking:
            self._blocking = False
            raise _Interrupted

    def until_set(self, work: Callable[[], None]) -> None:
        """Run `work` on the main thread; it is left half done when it is time to stop, and not begun when it was
        before."""
        try:
            self._blocking = True
            if not self.asked:
                work()
        except Exception:
            if not self.asked:  # Ray's compiled parts turn the interruption into errors of their own
                raise
        finally:
            self._blocking = False


class _Interrupted(Exception):
    """It is time to stop, and something blocked."""


def _run(job: JSON, stop: _Stop, tell: Callable[..., None]) -> None:
    manifest, path, address = parse_manifest(job["manifest"]), Path(job["path"]), job["address"]
    keys = parse_key_source(job["keys"])
    try:
        if address is None:
            start_local(job["folder"])
            # Ray's own handler would leave by way of a stack trace. The supervisor says when to end.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            gcs = ray.get_runtime_context().gcs_address
            tell("ray", address=gcs, dashboard=ray._private.worker.get_dashboard_url(), processes=local_processes())
            check_resources(manifest, ray.cluster_resources(), [node["Labels"] for node in ray.nodes()])
        else:
            attach(address)
        _serve(manifest, path, keys, Owner(socket.gethostname(), job["pid"]), stop, tell, address is None)
    finally:
        tell("stopping")
        carry_out([Step("leaving Ray", RAY_SECONDS, ray.shutdown)])


def _serve(
    manifest: Manifest,
    path: Path,
    keys: KeySource | None,
    owner: Owner,
    stop: _Stop,
    tell: Callable[..., None],
    own_ray: bool,
) -> None:
    console = Console(emoji=False)
    own_key = None
    if keys is not None:  # with one more key, for the one request that is asked here
        own_key, entry = passing_key("isotherm-serve")
        keys = replace(keys, given=(*keys.given, entry))
    controller = start_controller(manifest, path, keys, owner)
    served = False
    try:
        starting = controller.start.remote()
        stop.until_set(lambda: start_ingress(manifest, keys))
        _show_loading(controller, starting, stop, console)
        url = ray.get(controller.url.remote(), timeout=ANSWER_SECONDS)
        killed = lambda: ray.get(controller.killed_ingress.remote(), timeout=TELL_SECONDS)  # noqa: E731
        front_door = FrontDoorWatch(lambda line: _say(line, console), killed)
        front_door.look()  # so that whoever is there now is missed from the first moment on
        wait = wait_for_answer if own_ray else _wait_on_head
        certificate = None if manifest.http.tls is None else manifest.http.tls.certificate
        stop.until_set(lambda: wait(Asked(url, manifest.model_id, own_key, certificate)))
        if not stop.asked:
            served = True
            tell("serving", probe=own_ray)
            workers = ray.get(controller.status.remote(), timeout=ANSWER_SECONDS)["workers"]
            announce(manifest, keys is not None, workers, console)
        stopped = controller.wait_stopped.remote()
        losses = Losses(pid_of_worker)
        while not stop.asked and not ray.wait([stopped], timeout=LOOK_SECONDS)[0]:
            _tell(losses, controller, console)
            front_door.look()
        if not stop.asked:
            ray.get(stopped)
            tell("draining")
            ray.get(controller.take_up_end.remote(), timeout=ANSWER_SECONDS)
    finally:
        if served and not stop.at_once:
            seconds = manifest.http.drain_seconds
            carry_out([Step("draining the ingress", seconds + 1.5 * DRAIN_SLACK, lambda: drain_ingress(seconds, stop))])
        tell("stopping")
        stop_everything()


def _tell(losses: Losses, controller: ActorHandle, console: Console) -> None:
    """Says on the terminal which workers were lost, and replaced."""
    try:
        lines = losses.lines(ray.get(controller.operation_history.remote(), timeout=TELL_SECONDS))
    except RayError:
        return  # the controller, or Ray itself, is away; others see to that
    for line in lines:
        _say(line, console)


def _say(line: str, console: Console) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _wait_on_head(asked: Asked) -> None:
    """On the node that has the ingress, where its URL holds: it may be another machine than this one."""
    ray.get(ray.remote(wait_for_answer).options(num_cpus=0, resources=ON_HEAD, max_retries=0).remote(asked))


def stop_running(address: str | None) -> None:
    """End the cluster at a Ray address, as `isotherm stop` does: its open requests finish, for as long as its manifest
    lets them. Waits until it is gone. Raises NoClusterError, and ServeError where it takes too long."""
    attach(address)
    try:
        controller = running_controller()
        owner = ask_controller(controller, "owner")
        if owner is None:
            raise ServeError(
                "this cluster belongs to a RayService, which would start it again; end it with: "
                "kubectl delete rayservice NAME"
            )
        manifest: Manifest = ask_controller(controller, "served")[0]
        ask_controller(controller, "ask_to_end")
        # The process that serves sees this and ends the ingress, the controller, and Ray where it started it.
        if not _taken_up(controller):
            stop_everything()
        deadline = time.monotonic() + manifest.http.drain_seconds + STOP_TIMEOUT
        while time.monotonic() < deadline and _runs(controller):
            time.sleep(0.2)
    finally:
        ray.shutdown()
    while time.monotonic() < deadline and owner.host == socket.gethostname() and runs_as(owner.pid):
        time.sleep(0.1)
    if time.monotonic() >= deadline:
        seconds = manifest.http.drain_seconds + STOP_TIMEOUT
        raise ServeError(f"the cluster is not gone after {seconds:g} s; it is process {owner.pid} on {owner.host}")


def _taken_up(controller: ActorHandle) -> bool:
    """Whether the process that serves does what it was asked to. It may be gone, on a cluster that others have
    started."""
    deadline = time.monotonic() + ABSENT_SECONDS
    while time.monotonic() < deadline:
        try:
            if ray.get(controller.ending.remote(), timeout=ENDING_SECONDS):
                return True
        except GetTimeoutError:
            continue  # it hangs, and takes up nothing
        except RayError:
            return True  # it is gone already
        time.sleep(0.2)
    return False


def _runs(controller: ActorHandle) -> bool:
    try:
        ray.get(controller.owner.remote(), timeout=ENDING_SECONDS)
    except RayError:
        return False
    return True


def _show_loading(controller: ActorHandle, starting: Reference, stop: _Stop, console: Console) -> None:
    """Progress of every worker until all have loaded. Raises what `Controller.start` raised."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[read]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}
        phase = ""
        while not stop.asked:
            done = bool(ray.wait([starting], timeout=POLL)[0])
            if done:
                ray.get(starting)
            status = ray.get(controller.status.remote())
            if status["controller"]["phase"] != phase:
                phase = status["controller"]["phase"]
                console.print(phase, markup=False, highlight=False)
            for worker in status["workers"]:
                if worker["id"] not in tasks:
                    tasks[worker["id"]] = progress.add_task(f"loading {worker['id']}", total=1.0, read="")
                progress.update(tasks[worker["id"]], completed=worker.get("progress", 0.0), read=_read(worker))
            if done:
                return


def _read(worker: JSON) -> str:
    """What a worker has read of the checkpoint, and how fast: 1.5 GiB, 800.0 MiB/s."""
    rate = worker.get("read_bytes_per_second", 0)
    return f"{human_bytes(worker['read_bytes'])}, {human_bytes(rate)}/s" if rate else ""
