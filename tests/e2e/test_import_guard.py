"""From the repository's root, a local Ray's workers do not find this repository's folders by their bare names:
transformers asks for `kernels`."""

from __future__ import annotations

import sys
from pathlib import Path

from ray_driver import ROOT, run_driver

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
    seen = run_driver(DRIVER)
    assert Path(seen["cwd"]) != ROOT
    environment_folder = Path(sys.prefix).resolve()  # which may lie in the repository
    for name, places in seen["found"].items():
        ours = [
            p
            for p in map(Path, places)
            if p.resolve().is_relative_to(ROOT) and not p.resolve().is_relative_to(environment_folder)
        ]
        assert ours == [], f"{name} is ours"
    assert seen["transformers"]
