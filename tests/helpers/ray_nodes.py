"""Several Ray nodes on one machine, in a process of their own: `RayNodes` for tests; run as a program, it is that
process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
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
        self._folder = tempfile.mkdtemp(prefix="nodes-")
        self._log = open(os.path.join(self._folder, "nodes.log"), "w")
        command = [sys.executable, __file__, self._folder]
        # Ray's Cluster writes down its address where any Ray of this machine would look for one, in a folder that it
        # does not make; here that is not for others to find, nor over what they wrote.
        environment = os.environ | {"RAY_TMPDIR": self._folder, "RAY_raylet_start_wait_time_s": "120"}
        os.mkdir(os.path.join(self._folder, "ray"))
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log, "text": True}
        self._process = subprocess.Popen(command, cwd="/", env=environment, **pipes)
        self.address: str = self._answer()["address"]
        return self

    def __exit__(self, *_: object) -> None:
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            for process in [*family, psutil.Process(self._process.pid)] if self._process.poll() is None else family:
                if process.is_running():
                    process.kill()
            self._log.close()
            shutil.rmtree(self._folder, ignore_errors=True)

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
