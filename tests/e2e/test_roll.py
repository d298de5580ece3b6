"""Other weights, and other values of workers, are rolled out under live traffic: no request fails, and each stream is
what the weights that it began with make of it, whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from loaded import kill_controller, under_load
from other_weights import other_weights
from served import Served
from streams import Stream, Workload

from isotherm.cluster.client import APIError, Client
from isotherm.cluster.model.path import bundled_model

pytestmark = pytest.mark.chaos
ROUNDS = int(os.environ.get("ISOTHERM_CHAOS_ROUNDS", "1"))  # `make chaos` asks for more


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """The bundled one, which is served first, and another."""
    return bundled_model(), other_weights(tmp_path_factory.mktemp("models") / "other")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    manifest = {
        "liveness": {"timeout": 60.0},  # what is slow here is the machine
        "attention": {"cpus": 0.2},
        "experts": {"cpus": 0.1},
        "engine": {"kv_memory": "64MiB"},
        "autoscaling": {"mode": "off"},
    }
    cluster = Served(manifest, tmp_path_factory.mktemp("roll"))
    with cluster:
        yield cluster
    assert cluster.left_over() == {"processes": [], "shared memory": []}


@pytest.fixture(scope="module")
def workload(models) -> tuple[Workload, list[list[str]]]:
    """Streams, and what each model alone makes of them."""
    work = Workload(32, [150])
    return work, [work.alone(model) for model in models]


def rolled(served: Served, model: Path) -> str:
    """The fingerprint that the model has once it is rolled out and the one before is gone."""
    with Client(served.url) as client:
        operation = client.wait_for_operation(client.roll(str(model), deadline_seconds=300)["id"], timeout=400)
    assert operation["phase"] == "done", operation["reasons"]
    status = served.status()
    assert status["model"]["path"] == str(model) and status["leaving"] is None
    roles = Counter(worker["role"] for worker in status["workers"])
    assert roles == {"attention": 1, "expert": 2}, status["workers"]
    return status["numerics"]["system_fingerprint"]


def committed(served: Served) -> dict[str, Any]:
    """The status as soon as the operation that is under way is committed, and streams finish."""
    deadline = time.monotonic() + 300
    while (status := served.status())["leaving"] is None:
        assert time.monotonic() < deadline, status
        time.sleep(0.05)
    return status


@pytest.fixture(autouse=True)
def _at_home(served, models) -> None:
    """Each test begins with the bundled model, however the one before has ended."""
    if served.status()["model"]["path"] != str(models[0]):
        rolled(served, models[0])


def check(streams: list[Stream], expected: dict[str, list[str]]) -> Counter[str]:
    """How many streams each fingerprint had; `expected`: the texts of its weights."""
    assert [s.error or s.cut for s in streams if s.error or s.cut or not s.done] == []
    had: Counter[str] = Counter()
    for i, stream in enumerate(streams):
        (fingerprint,) = stream.fingerprints
        texts = expected[fingerprint]
        assert stream.text == texts[i % len(texts)], f"stream {i} of {fingerprint}"
        had[fingerprint] += 1
    print(f"{len(streams)} streams, 0 failed, 0 altered; by fingerprint: {dict(had)}")
    return had


def updated(served: Served, **http: Any) -> None:
    """The ingress replica is another, with these values."""
    before = replica(served)
    manifest = yaml.safe_load(served.manifest.read_text())
    path = served.manifest.with_name("updated.yaml")
    path.write_text(yaml.safe_dump(manifest | {"http": manifest["http"] | http}))
    done = served.command("roll", "--ingress", str(path), "--address", served.ray_address(), timeout=400)
    assert done.returncode == 0 and "1 ingress replica(s) replaced" in done.stdout, done
    assert replica(served) != before


def replica(served: Served) -> int:
    served.remember_processes()
    found = []
    for process in served._family.values():
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::ServeReplica"):
                found.append((process.create_time(), process.pid))
    return max(found)[1]


def test_to_and_fro_under_streams(served, models, workload):
    """And the ingress is updated, in between."""
    work, alone = workload
    fingerprints = [served.status()["numerics"]["system_fingerprint"]]

    def act() -> None:
        for _ in range(ROUNDS):
            for model in reversed(models):
                fingerprints.append(rolled(served, model))
                updated(served)

    streams = under_load(served, work, act)
    first, second, third = fingerprints[:3]
    assert first == third != second
    had = check(streams, dict(zip((first, second), alone, strict=True)))
    assert set(had) == {first, second}


def test_workers_of_both_models_and_the_controller_die_meanwhile(served, models, workload):
    """One of the old once it is committed, and the controller: streams finish on the weights that they began with."""
    work, alone = workload
    before = served.status()["numerics"]["system_fingerprint"]

    def act() -> None:
        with Client(served.url) as client:
            operation = client.roll(str(models[1]), deadline_seconds=300)
            status = committed(served)
            old = {w["role"]: w for w in status["workers"] if w["revision"] == status["leaving"]["revision"]}
            os.kill(old["attention"]["pid"], signal.SIGKILL)
            os.kill(old["expert"]["pid"], signal.SIGKILL)
            time.sleep(1)
            kill_controller(served)
            assert client.wait_for_operation(operation["id"], timeout=400)["phase"] == "done"

    streams = under_load(served, work, act)
    after = served.status()
    assert after["model"]["path"] == str(models[1])
    check(streams, {before: alone[0], after["numerics"]["system_fingerprint"]: alone[1]})
    assert rolled(served, models[0]) == before


def test_values_of_a_manifest_under_streams_and_with_a_controller_that_dies(served, models, workload, tmp_path):
    """Less KV memory, which no bit depends on, and then activations in float32, which all do; and back."""
    work, alone = workload
    first = yaml.safe_load(served.manifest.read_text())
    smaller = first | {"engine": {"kv_memory": "32MiB", "max_model_len": 1024}}
    wider = first | {"dtype": "float32"}
    float32 = work.alone(models[0], "float32")
    fingerprints = [served.status()["numerics"]["system_fingerprint"]]
    lengths = [served.status()["model"]["max_model_len"]]

    def act() -> None:
        for manifest in (smaller, wider, first):
            path = tmp_path / "values.yaml"
            path.write_text(yaml.safe_dump(manifest))
            options = ("--manifest", str(path), "--url", served.url, "--deadline", "300")
            dry = served.command("roll", *options, "--dry-run")
            assert dry.returncode == 0 and "change " in dry.stdout, dry
            with Client(served.url) as client:
                begun = client.roll(manifest=manifest, deadline_seconds=300)
                assert begun["plan"][0] in dry.stdout
                if manifest is smaller:
                    committed(served)
                    kill_controller(served)
                assert client.wait_for_operation(begun["id"], timeout=400)["phase"] == "done", client.operations()[-1]
            status = served.status()
            fingerprints.append(status["numerics"]["system_fingerprint"])
            lengths.append(status["model"]["max_model_len"])

    streams = under_load(served, work, act)
    bfloat, same, other, again = fingerprints
    assert bfloat == same == again != other
    assert lengths[1] == 1024 and lengths[0] == lengths[2] == lengths[3] > 1024
    had = check(streams, {bfloat: alone[0], other: float32})
    assert set(had) == {bfloat, other}
    done = served.command("roll", "--manifest", str(tmp_path / "values.yaml"), "--url", served.url)
    assert done.returncode == 1 and "values that the workers have already" in done.stderr, done


def test_what_fails_before_the_commit_is_undone(served, models, workload):
    work, alone = workload
    before = served.status()

    def act() -> None:
        with Client(served.url) as client:
            operation = client.roll(str(models[1]), deadline_seconds=300)
            deadline = time.monotonic() + 300
            while not (new := [w for w in served.status()["workers"] if w["revision"] > before["model"]["revision"]]):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            while (pid := new[0]["pid"]) is None:
                new = [w for w in served.status()["workers"] if w["id"] == new[0]["id"]]
            os.kill(pid, signal.SIGKILL)
            ended = client.wait_for_operation(operation["id"], timeout=400)
            assert ended["phase"] == "rolled_back", ended

    streams = under_load(served, work, act)
    after = served.status()
    assert [w["id"] for w in after["workers"]] == [w["id"] for w in before["workers"]]
    assert after["model"] == before["model"] and after["leaving"] is None
    check(streams, {before["numerics"]["system_fingerprint"]: alone[0]})


def test_an_updated_ingress_has_a_manifests_values_and_the_model_that_was_rolled_out(served, models):
    rolled(served, models[1])
    updated(served, aliases=["also"])
    with Client(served.url) as client:
        assert client.models() == ["tiny", "also"]
        assert (
            client.complete("1 + 1 =", model="also", max_tokens=2).system_fingerprint
            == (served.status()["numerics"]["system_fingerprint"])
        )
    kill_controller(served)
    done = served.command("roll", "--ingress", "--address", served.ray_address(), timeout=400)  # as it was
    assert done.returncode == 0, done
    with Client(served.url) as client:
        assert client.models() == ["tiny", "also"]
    other = served.manifest.with_name("other.yaml")
    manifest = yaml.safe_load(served.manifest.read_text())
    other.write_text(yaml.safe_dump(manifest | {"engine": {"kv_memory": "32MiB"}}))
    done = served.command("roll", "--ingress", str(other), "--address", served.ray_address())
    assert done.returncode == 1 and "engine.kv_memory: 67108864 → 33554432 (by isotherm roll --m" in done.stderr, done
    rolled(served, models[0])


def test_one_that_begins_smaller_grows_when_the_other_is_gone(served, models):
    before = served.status()["numerics"]["system_fingerprint"]
    with Client(served.url) as client:
        begun = client.roll(str(models[1]), expert_groups=1, deadline_seconds=300)
        assert client.wait_for_operation(begun["id"], timeout=400)["phase"] == "done"
        deadline = time.monotonic() + 120
        while len([w for w in served.status()["workers"] if w["state"] == "loaded"]) < 3:
            assert time.monotonic() < deadline, client.operations()[-1]
            time.sleep(0.2)
        assert client.operations()[-1]["reasons"] == ["as many workers as before others took their place"]
    assert rolled(served, models[0]) == before


def test_dry_runs_and_refusals(served, models, tmp_path):
    done = served.command("roll", str(models[1]), "--url", served.url, "--dry-run")
    assert done.returncode == 0 and "start attention-" in done.stdout and "memory beside what serves" in done.stdout
    assert len(served.status()["workers"]) == 3
    other = other_weights(tmp_path / "rope", rope_theta=5000.0)
    truncated = other_weights(tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with Client(served.url) as client:
        for model, words in (
            (other, "rope"),
            (truncated, "model.safetensors"),
            (tmp_path / "none", "config.json"),
            (models[0], "served already"),
        ):
            with pytest.raises(APIError, match=words) as error:
                client.roll(str(model))
            assert error.value.status == 400 and error.value.param == "model"
    assert len(served.status()["workers"]) == 3
