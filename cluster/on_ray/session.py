"""Starts a local Ray or attaches to a running one."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import ray
from ray._private import parameter
from ray._private.utils import write_ray_address
from ray.exceptions import GetTimeoutError, RayActorError

from isotherm.cluster.errors import IsothermError, one_line
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.on_ray.controller_process import find_controller
from isotherm.cluster.on_ray.handles import ActorHandle

CONNECT_TIMEOUT = 5.0  # seconds
ANSWER_SECONDS = 30.0  # that a controller has to answer: Ray may be starting it again
OBJECT_STORE_BYTES = 200 << 20  # tokens and control messages only: tensors never go through the object store


class NoClusterError(IsothermError, RuntimeError):
    """There is no Ray cluster to attach to, or no Isotherm on it; the message says what to do."""


@contextlib.contextmanager
def neutral_directory() -> Iterator[None]:
    """Ray puts the driver's current directory on its workers' sys.path, where a stray `kernels` or `cluster` folder
    would hide an installed package, and starts them in it. So drivers start Ray from the file system's root, which
    stays and holds no packages."""
    before = os.getcwd()
    os.chdir(os.path.abspath(os.sep))
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _agent_at_any_port() -> Iterator[None]:
    """The agent that takes jobs wants one certain port, and takes none where another Ray of this machine has it. Ray's
    own command line can choose another, `ray.init` cannot."""
    params = parameter.RayParams
    parameter.RayParams = partial(params, dashboard_agent_listen_port=0)  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        parameter.RayParams = params  # type: ignore[misc]


def start_local(folder: str, num_cpus: int | None = None, dashboard: bool = True) -> None:
    """A Ray of our own on this machine, loopback only; it ends with this process or with `ray.shutdown()`. Its
    environment is `prepare_local_ray`'s. `folder` takes its logs and sockets; a short path, for Unix sockets allow 107
    characters in all."""
    with neutral_directory(), _agent_at_any_port():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=folder,
        )
    # Where a job of this Ray looks for its address; with none there it would take that of any Ray of this machine.
    write_ray_address(ray.get_runtime_context().gcs_address, folder)


def local_processes() -> dict[str, int]:
    """Pids of the processes of the Ray that `start_local` has started, by Ray's names of them: gcs_server, raylet,
    dashboard, log_monitor, monitor."""
    node: Any = ray._private.worker._global_node
    started = node.all_processes
    return {kind: infos[0].process.pid for kind, infos in started.items() if infos}


def attach(address: str | None) -> None:
    """Join a running cluster as a driver; `address` as `prepare_attach` gave it. Raises NoClusterError, also without an
    address: Ray itself would take any cluster that it finds on this machine, whoever's it is."""
    if address is None:
        raise NoClusterError(
            "no `isotherm serve` of this user runs on this machine; start one, or give --address or RAY_ADDRESS"
        )
    with neutral_directory():
        try:
            _check_reachable(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, ValueError) as error:  # ConnectionError is Ray's; ValueError: not an address
            raise NoClusterError(
                f"no Ray cluster at {address} ({one_line(error)}); start one with: isotherm serve"
            ) from None


def _check_reachable(address: str) -> None:
    """Ray itself tries for a minute where nothing listens, and for ever where what listens stands still, whose system
    takes connections all the same. Raises OSError."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        return
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT)
        except grpc.FutureTimeoutError:
            raise TimeoutError(f"it takes connections, and has not answered in {CONNECT_TIMEOUT:g} s") from None


def running_controller() -> ActorHandle:
    """The controller of the cluster that this driver has attached to. Raises NoClusterError."""
    try:
        return find_controller()
    except ValueError:
        raise NoClusterError(
            "this Ray cluster runs no Isotherm; start it with: isotherm serve --address RAY_ADDRESS"
        ) from None


def ask_controller(controller: ActorHandle, name: str, *args: Any) -> Any:
    """What one of its methods gives. Raises NoClusterError where it does not answer."""
    try:
        return ray.get(getattr(controller, name).remote(*args), timeout=ANSWER_SECONDS)
    except GetTimeoutError:
        raise NoClusterError(
            f"the cluster's controller has not answered in {ANSWER_SECONDS:g} s; one that hangs is replaced: try again"
        ) from None
    except RayActorError as error:
        raise NoClusterError(f"the cluster's controller is gone: {one_line(error)}") from None


def cluster_status(address: str | None) -> JSON:
    """What the controller of a running cluster says of itself and the workers. Raises NoClusterError."""
    status: JSON = _answer(address, "status")
    return status


def cluster_url(address: str | None) -> str:
    """The HTTP endpoint of a running cluster. Raises NoClusterError."""
    url: str = _answer(address, "url")
    return url


def _answer(address: str | None, name: str) -> Any:
    """What one of the controller's methods gives, over a connection of its own. Raises NoClusterError."""
    attach(address)
    try:
        return ask_controller(running_controller(), name)
    finally:
        ray.shutdown()
