"""Several Ray nodes on one machine, in a process of their own: `RayNodes` for tests; run as a program, it is that
process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

from isotherm.cluster.on_ray.environment import prepare_local_ray


class RayNodes:
    """Context manager: a head without CPUs. Nodes are added and, at the latest at the end, removed. Nothing of it
    stays."""

    def __init__(self) -> None:
        self._raylets: dict[str, psutil.Process] = {}

    def __enter__(self) -> RayNodes:
        with ExitStack() as left:
            folder = tempfile.mkdtemp(prefix="nodes-")
            left.callback(shutil.rmtree, folder, ignore_errors=True)
            self._log = left.enter_context(open(os.path.join(folder, "nodes.log"), "w"))
            # Ray's Cluster writes down its address where any Ray of this machine would look for one, in a folder that
            # it does not make; here that is not for others to find, nor over what they wrote.
            environment = os.environ | {"RAY_TMPDIR": folder, "RAY_raylet_start_wait_time_s": "120"}
            os.mkdir(os.path.join(folder, "ray"))
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log, "text": True}
            command = [sys.executable, __file__, folder]
            self._process = subprocess.Popen(command, cwd="/", env=environment, **pipes)
            left.callback(self._end)
            self.address: str = self._answer()["address"]
            self._left = left.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.close()

    def _end(self) -> None:
        """The process and all below it."""
        family = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
        try:
            with suppress(BrokenPipeError):  # of a question that it did not live to hear
                self._process.stdin.close()
            self._process.wait(60)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.stdout.close()

    def add(self, cpus: float, environment: dict[str, str] | None = None, **labels: str) -> str:
        """Start a node; gives Ray's id of it. `environment` is added to that of its workers."""
        answer = self._ask({"add": {"num_cpus": cpus, "labels": labels, "env_vars": environment or {}}})
        self._raylets[answer["node"]] = psutil.Process(answer["raylet"])
        return answer["node"]

    def remove(self, node: str) -> None:
        self._ask({"remove": node})

    def actors_on(self, node: str) -> list[str]:
        """Titles of the processes on a node that host an actor or run a task, but for Ray's own agents and those that
        wait for work."""
        titles = []
        for process in self._raylets[node].children(recursive=True):
            try:
                title = " ".join(process.cmdline()).strip()
            except psutil.NoSuchProcess:
                continue
            if title.startswith("ray::") and not title.startswith(
                ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
            ):
                titles.append(title)
        return titles

    def _ask(self, question: dict[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the Ray nodes has ended:\n{Path(self._log.name).read_text()}")
        return json.loads(line)


def main(folder: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    prepare_local_ray()
    from ray.cluster_utils import Cluster

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=out, flush=True)

    common = {"object_store_memory": 100 << 20, "include_dashboard": False}
    # No dashboard is wanted, but Ray would want its usual port all the same, which another Ray may have.
    head = {"num_cpus": 0, "temp_dir": folder, "dashboard_port": None, **common}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    say(address=cluster.address)
    nodes = {}
    try:
        for line in sys.stdin:
            question = json.loads(line)
            if "add" in question:
                node = cluster.add_node(**question["add"], **common)
                raylet = node.all_processes["raylet"][0].process.pid
                nodes[node.node_id] = node
                say(node=node.node_id, raylet=raylet)
            else:
                cluster.remove_node(nodes.pop(question["remove"]))
                say()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
