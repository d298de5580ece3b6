"""From the repository's root, a local Ray's workers do not find this repository's folders by their bare names:
transformers asks for `kernels`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import json, os, sys, tempfile
from isotherm.cluster.on_ray.environment import prepare_local_ray
prepare_local_ray()
import ray
from isotherm.cluster.on_ray.session import start_local

class Probe:
    def look(self):
        import importlib.util
        found = {}
        for name in ("kernels", "cluster", "actors", "manifests"):
            spec = importlib.util.find_spec(name)
            found[name] = [] if spec is None else \
[str(p) for p in [spec.origin, *(spec.submodule_search_locations or [])] if p]
        import transformers
        from transformers import DeepseekV3ForCausalLM
        import isotherm.kernels.ops
        return {"found": found, "transformers": transformers.__version__, "cwd": os.getcwd(), "pid": os.getpid()}

before = os.getcwd()
start_local(sys.argv[1], num_cpus=1, dashboard=False)
assert os.getcwd() == before, "the driver's own directory is put back"
import psutil
family = [p.pid for p in psutil.Process().children(recursive=True)]
try:
    seen = ray.get(ray.remote(Probe).options(num_cpus=0).remote().look.remote(), timeout=100)
    family += [p.pid for p in psutil.Process().children(recursive=True)]
finally:
    ray.shutdown()
print(json.dumps(seen | {"family": sorted(set(family))}))
"""


def test_workers_do_not_find_our_folders_by_their_bare_names():
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTEST_ADDOPTS") and not name.startswith("RAY_")
    }
    with tempfile.TemporaryDirectory(prefix="guard-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", DRIVER, folder]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stdout + done.stderr
        seen = json.loads(done.stdout.splitlines()[-1])
        assert Path(seen["cwd"]) != ROOT
        environment_folder = Path(sys.prefix).resolve()  # which may lie in the repository
        for name, places in seen["found"].items():
            ours = [
                p
                for p in map(Path, places)
                if p.resolve().is_relative_to(ROOT) and not p.resolve().is_relative_to(environment_folder)
            ]
            assert ours == [], f"{name} is ours"
        assert seen["transformers"] and len(seen["family"]) > 2
        _, alive = psutil.wait_procs(
            [psutil.Process(pid) for pid in seen["family"] if psutil.pid_exists(pid)], timeout=15
        )
        assert [p.cmdline()[:2] for p in alive if p.is_running()] == []
