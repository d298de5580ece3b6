"""A worker that is started, by a detached actor as the controller is one, begins in the process that stands ready."""

from __future__ import annotations

from ray_driver import run_driver

DRIVER = """
import json, sys, time
from isotherm.cluster.on_ray.environment import prepare_local_ray
prepare_local_ray()
import psutil, ray
from isotherm.cluster.on_ray.session import start_local

class Worker:
    def look(self):
        import os
        return os.getpid()

class Controller:
    async def start_spare(self):
        from isotherm.cluster.on_ray.spare_process import start_spare
        there = await start_spare(ray.nodes()[0]["NodeID"], 600)
        return there, await start_spare("00" * 28, 600)

    async def start(self, name):
        from isotherm.cluster.on_ray.workers import end_worker, reserve, start_worker
        slot = await reserve(name, {"CPU": 0.1})
        worker = start_worker(name, slot, {"CPU": 0.1}, Worker)
        found = await worker.actor.look.remote()
        end_worker(worker)
        return found

start_local(sys.argv[1], num_cpus=1, dashboard=False)
family = {p.pid for p in psutil.Process().children(recursive=True)}
try:
    controller = ray.remote(Controller).options(num_cpus=0, name="controller", lifetime="detached").remote()
    asked = ray.get(controller.start_spare.remote(), timeout=60)
    def ready():
        for process in psutil.Process().children(recursive=True):
            try:
                if process.name() == "ray::IDLE" and any("libtorch" in m.path for m in process.memory_maps()):
                    return process.pid
            except psutil.NoSuchProcess:
                pass
    end, spare = time.monotonic() + 90, None
    while spare is None and time.monotonic() < end:
        time.sleep(0.2)
        spare = ready()
    pid = ray.get(controller.start.remote("expert-0"), timeout=60)
    other = ray.get(controller.start.remote("expert-1"), timeout=60)
finally:
    family |= {p.pid for p in psutil.Process().children(recursive=True)}
    ray.shutdown()
print(json.dumps({"asked": asked, "spare": spare, "pid": pid, "other": other, "family": sorted(family)}))
"""


def test_a_worker_begins_in_the_process_that_stands_ready():
    seen = run_driver(DRIVER)
    assert seen["asked"] == [True, False], "there is no second node"
    assert seen["spare"] is not None and seen["pid"] == seen["spare"] != seen["other"]
