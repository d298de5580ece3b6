"""The way in on Kubernetes, without Kubernetes: Serve builds the application from a config as KubeRay submits it; the
node has a role label."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import shared_memory
import yaml

from isotherm.cluster.api.access.hashing import hashed, new_key, new_key_id
from isotherm.cluster.api.access.keys_file import KeyEntry, write_keys
from isotherm.cluster.cli.own_cluster import free_port

pytestmark = pytest.mark.long

KUBERAY = Path(__file__).parents[2] / "manifests" / "kuberay" / "cpu-dev.yaml"
DRIVER = """
import asyncio, functools, json, os, sys, time
import httpx, psutil, shared_memory, yaml
from isotherm.cluster.on_ray.environment import prepare_local_ray
prepare_local_ray()
import ray
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from isotherm.cluster.on_ray.session import start_local
from isotherm.cluster.on_ray.controller_process import find_controller
from isotherm.cluster.on_ray.workers import reserve
from isotherm.cluster.deploy.serve import stop_everything

folder, url, config, other = sys.argv[1:3] + [yaml.safe_load(a) for a in sys.argv[3:5]]
ray.init = functools.partial(ray.init, labels={"role": "both"})
start_local(folder, num_cpus=2)
family, shared = set(), set()

def look():
    children = psutil.Process().children(recursive=True)
    family.update(p.pid for p in children)
    shared.update(shared_memory.files(children))

def wait(what, seconds=150):
    end = time.monotonic() + seconds
    while not (found := what()):
        look()
        if time.monotonic() > end:
            raise TimeoutError(json.dumps(client.get_serve_details(), default=str)[:5000])
        time.sleep(0.3)
    return found

def ready():
    try:
        return httpx.get(url + "/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False

def controller_pid():
    return ray.get(find_controller().status.remote())["controller"]["pid"]

def application(status):
    app = client.get_serve_details()["applications"]["isotherm"]
    return app if app["status"] == status else None

out = {}
try:
    client = ServeSubmissionClient("http://" + ray._private.worker.get_dashboard_url())
    client.deploy_applications(config)
    wait(ready)
    headers = {"authorization": "Bearer " + os.environ["ISOTHERM_API_KEY"]}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What is 3 + 4?"}], "temperature": 0}
    ask = lambda: httpx.post(url + "/v1/chat/completions", json=body, headers=headers, timeout=30)\
.json()["choices"][0]["message"]["content"]
    out["unasked"] = httpx.get(url + "/status", timeout=30).status_code
    status = httpx.get(url + "/status", headers=headers, timeout=30).json()
    out["answer"], out["status"], pid = ask(), status, controller_pid()
    out["owner"] = ray.get(find_controller().owner.remote())
    client.deploy_applications(config)  # as KubeRay does again and again
    wait(lambda: application("RUNNING"))
    out["same"] = pid == controller_pid()
    client.deploy_applications(other)
    out["refusal"] = wait(lambda: application("DEPLOY_FAILED"))["message"]
    out["answer_after"], out["same_after"] = ask(), pid == controller_pid()

    async def nowhere():
        try:
            await asyncio.wait_for(reserve("nowhere", {"CPU": 0.01}, {"role": "gpu"}), 2)
        except asyncio.TimeoutError:
            return "waits"
        return "placed"

    out["elsewhere"] = asyncio.run(nowhere())
    out["somewhere"] = asyncio.run(reserve("somewhere", {"CPU": 0.01}, {"role": "!gpu"})).host
    look()
finally:
    stop_everything()
    ray.shutdown()
print(json.dumps(out | {"family": sorted(family), "shared": sorted(shared)}))
"""


def config(port: int, manifest: Path) -> str:
    """The serveConfigV2 of the manifest that is shipped, with another port and the manifest at another place."""
    service = list(yaml.safe_load_all(KUBERAY.read_text()))[1]
    out = yaml.safe_load(service["spec"]["serveConfigV2"])
    out["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = out["applications"]
    application["args"]["manifest"] = str(manifest)
    application["deployments"][0]["ray_actor_options"]["label_selector"] = {"role": "in(attention,both)"}
    return yaml.safe_dump(out)


def test_serve_starts_the_controller_once_and_binds_the_ingress(tmp_path: Path):
    port = free_port()
    manifest = {
        "attention": {"cpus": 0.2, "threads": 1, "labels": {"role": "in(attention,both)"}},
        "experts": {"groups": 2, "cpus": 0.2, "threads": 1, "labels": {"role": "!attention"}},
        "http": {"port": port, "keys": str(tmp_path / "keys.json")},
    }
    key = new_key(key_id := new_key_id())
    entry = KeyEntry(id=key_id, name="me", hash=hashed(key), roles=["use", "admin"])
    write_keys(tmp_path / "keys.json", [entry])
    (tmp_path / "isotherm.yaml").write_text(yaml.safe_dump(manifest))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(manifest | {"experts": {"groups": 3}}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["ISOTHERM_API_KEY"] = key
    environment["PYTHONPATH"] = str(Path(shared_memory.__file__).parent)
    with tempfile.TemporaryDirectory(prefix="kube-", ignore_cleanup_errors=True) as folder:
        arguments = [
            folder,
            f"http://127.0.0.1:{port}",
            config(port, tmp_path / "isotherm.yaml"),
            config(port, tmp_path / "other.yaml"),
        ]
        command = [sys.executable, "-c", DRIVER, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        out = json.loads(done.stdout.splitlines()[-1])
    assert out["unasked"] == 401
    assert "7" in out["answer"] and out["answer_after"] == out["answer"]
    assert [(w["id"], w["state"]) for w in out["status"]["workers"]] == [
        ("attention-0", "loaded"),
        ("expert-0", "loaded"),
        ("expert-1", "loaded"),
    ]
    assert out["owner"] is None, "no process waits for it to be stopped"
    assert out["same"] and out["same_after"], "the controller is started once"
    assert "other.yaml is not what the workers that run have" in out["refusal"]
    assert out["elsewhere"] == "waits" and out["somewhere"], "label selectors reach the placement groups"
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in out["family"] if psutil.pid_exists(pid)], timeout=15)
    assert [p.cmdline()[:2] for p in alive if p.is_running()] == []
    assert shared_memory.still_there(out["shared"]) == []
