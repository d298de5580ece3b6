"""What one ingress replica keeps, another finds: over a Ray of the test's own, without a model."""

from __future__ import annotations

import subprocess
import sys

from ray_nodes import RayNodes

REPLICAS = """
import sys
from isotherm.cluster.on_ray.environment import prepare_attach
address = prepare_attach(sys.argv[1])  # before Ray is imported
import ray
from isotherm.cluster.api.response_store import Kept
from isotherm.cluster.deploy.kept_responses import SharedResponseStore, forget_responses
from isotherm.cluster.on_ray.session import attach

attach(address)

def kept(name):
    return Kept.of({"id": name, "previous_response_id": None, "text": "x" * 100}, [{"id": "item"}])

@ray.remote(num_cpus=0)
def another_replica(name):
    store = SharedResponseStore(10_000)
    found = store.get("me", name)
    store.put("me", kept("there"))
    return None if found is None else found.response["text"], store.get("you", name)

store = SharedResponseStore(10_000)
assert store.get("me", "here") is None
store.put("me", kept("here"))
assert ray.get(another_replica.remote("here")) == ("x" * 100, None)
assert store.get("me", "there").input_items == [{"id": "item"}]
assert store.delete("me", "there") and not store.delete("me", "there")

forget_responses()
forget_responses()
assert store.get("me", "here") is None, "it should be forgotten"
store.put("me", kept("again"))
assert store.get("me", "again") is not None
forget_responses()

ray.shutdown()
print("as it should be")
"""


def test_replicas_keep_responses_together():
    with RayNodes() as nodes:
        run = subprocess.run(
            [sys.executable, "-c", REPLICAS, nodes.address], cwd="/", capture_output=True, text=True, timeout=60
        )
        assert run.stdout.endswith("as it should be\n"), run.stdout + run.stderr
