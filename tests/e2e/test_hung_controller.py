"""A detached actor in the controller's place, over a real Ray: several watchers, and one new process for each time that
it hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

pytestmark = pytest.mark.long

DRIVER = """
import asyncio, json, os, sys, time
from isotherm.cluster.on_ray.environment import prepare_local_ray
prepare_local_ray()
import ray
from isotherm.cluster.control.liveness import watch_controller
from isotherm.cluster.on_ray.session import start_local
from isotherm.cluster.on_ray.controller_process import CONTROLLER, ControllerProcess
from isotherm.cluster.on_ray.workers import NAMESPACE

LIMIT = 1.5

class Controller:
    async def answer(self):
        pass

    async def pid(self):
        return os.getpid()

    async def block(self, how):
        if how == "sleeping":
            time.sleep(1000)
        while True:  # never lets another thread of Python run for long
            sum(range(10**9))

class Watcher:
    async def __init__(self):
        self.task = asyncio.create_task(watch_controller(ControllerProcess(), LIMIT))

    async def watching(self):
        return not self.task.done()

start_local(sys.argv[1], num_cpus=1, dashboard=False)
try:
    options = {"lifetime": "detached", "max_restarts": -1, "max_task_retries": -1, "num_cpus": 0}
    controller = ray.remote(Controller).options(name=CONTROLLER, namespace=NAMESPACE, **options).remote()
    watchers = [ray.remote(Watcher).options(num_cpus=0).remote() for _ in range(3)]
    ray.get([w.watching.remote() for w in watchers])
    pids = [ray.get(controller.pid.remote())]
    for how in ("sleeping", "computing"):
        controller.block.options(max_task_retries=0).remote(how)
        time.sleep(0.5)  # it may come to the next call first
        pids.append(ray.get(controller.pid.remote(), timeout=40))
        time.sleep(2 * LIMIT)  # in which nobody else may kill the new one
        pids.append(ray.get(controller.pid.remote()))
    from ray._private.state import actors
    restarts = actors(controller._actor_id.hex())["NumRestarts"]
    print(json.dumps({"pids": pids, "restarts": restarts, \
"watching": ray.get([w.watching.remote() for w in watchers])}))
finally:
    ray.shutdown()
"""


def test_each_time_that_it_hangs_it_is_replaced_once():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="hung-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", DRIVER, folder]
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))  # Ray prints there too
    first, second, again, third, still = seen["pids"]
    assert len({first, second, third}) == 3 and (second, third) == (again, still), seen
    assert seen["restarts"] == 2 and all(seen["watching"])
