"""The RayService manifests: valid by KubeRay's own schema, by Serve's and by our loader, and with room for the workers
and a 671B checkpoint."""

from __future__ import annotations

import gzip
import importlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from published import DEEPSEEK_V3

from isotherm.cluster.deploy.inspect import Report, inspect_model
from isotherm.cluster.manifest import Manifest, parse_manifest
from isotherm.cluster.manifest_values import parse_bytes
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.model.tensors import Part
from isotherm.cluster.on_ray.environment import NODE_ENVIRONMENT

FOLDER = Path(__file__).parents[2] / "manifests" / "kuberay"
FILES = sorted(FOLDER.glob("*.yaml"))
GPU_BYTES = 80e9


def strict(schema: Any) -> Any:
    """Kubernetes' structural schema as JSON Schema: an object with properties takes no others (the API server would
    drop them silently), unless it says so; int-or-string stands for itself; formats and x- extensions mean nothing
    here."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = {
        name: value for name, value in schema.items() if not name.startswith("x-") and name not in ("format", "default")
    }
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    for name in ("items", "additionalProperties", "anyOf", "allOf", "oneOf", "not"):
        if name in out:
            out[name] = strict(out[name])
    if "properties" in out:
        out["properties"] = {name: strict(value) for name, value in out["properties"].items()}
        # Kubernetes itself knows what is in metadata.
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    if schema.get("nullable"):
        out["type"] = [out["type"], "null"]
    return out


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    file = Path(__file__).parent / "data" / "rayservice-v1.schema.json.gz"
    return jsonschema.Draft202012Validator(strict(json.loads(gzip.decompress(file.read_bytes()))))


class Documents:
    """The two documents of a file."""

    def __init__(self, path: Path):
        self.text = path.read_text()
        self.config_map, self.service = yaml.safe_load_all(self.text)
        self.cluster = self.service["spec"]["rayClusterConfig"]
        self.manifest: Manifest = parse_manifest(yaml.safe_load(self.config_map["data"]["isotherm.yaml"]), path.name)
        self.serve = yaml.safe_load(self.service["spec"]["serveConfigV2"])
        self.groups = {group["groupName"]: group for group in self.cluster["workerGroupSpecs"]}

    def pods(self) -> list[dict[str, Any]]:
        return [spec["template"]["spec"] for spec in (self.cluster["headGroupSpec"], *self.groups.values())]

    def limits(self, group: str) -> dict[str, Any]:
        return self.groups[group]["template"]["spec"]["containers"][0]["resources"]["limits"]


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def documents(request: pytest.FixtureRequest) -> Documents:
    return Documents(request.param)


def quantity(text: str) -> int:
    """Kubernetes' sizes: Gi is our GiB."""
    return parse_bytes(f"{text}B" if str(text)[-1].isalpha() else text)


def test_there_are_the_three_that_the_readme_speaks_of():
    assert [path.stem for path in FILES] == ["cpu-dev", "experts-on-cpu", "h100"]


def test_the_image_holds_what_is_installed_and_the_ray_of_the_manifests():
    text = (FOLDER / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY --chown=ray (.*) \S+$", text, re.MULTILINE) for name in line.split()}
    root = FOLDER.parents[1]
    assert all((root / name).exists() for name in copied)
    assert copied == {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "isotherm",
        *(p.name for p in (root / "isotherm").iterdir()),
    }
    assert set(re.findall(r"rayproject/ray:([\d.]+)-", text)) == {
        Documents(path).cluster["rayVersion"] for path in FILES
    }
    assert "manifests/kuberay/Dockerfile" in text
    assert all("manifests/kuberay/Dockerfile" in path.read_text() for path in FILES)


def problems(validator: jsonschema.Draft202012Validator, service: Any) -> list[str]:
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in validator.iter_errors(service)]


def test_kuberay_accepts_the_service(documents: Documents, validator: jsonschema.Draft202012Validator):
    assert problems(validator, documents.service) == []
    assert (documents.service["apiVersion"], documents.service["kind"]) == ("ray.io/v1", "RayService")


def change(service: Any, path: str, value: Any) -> Any:
    service = json.loads(json.dumps(service))
    *way, last = path.split("/")
    at = service
    for name in way:
        at = at[int(name) if isinstance(at, list) else name]
    at[last] = value
    return service


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/serveConfig", "x"),
        ("spec/rayClusterConfig/headGroupSpec/templat", {}),
        ("spec/rayClusterConfig/workerGroupSpecs/0/label", {"role": "x"}),
        ("spec/rayClusterConfig/workerGroupSpecs/0/replicas", "two"),
        ("spec/rayClusterConfig/workerGroupSpecs/0/labels", {"role": 3}),
        ("spec/rayClusterConfig/workerGroupSpecs/0/template/spec/containers/0/resources/limits", {"cpu": 1.5}),
        ("spec/rayClusterConfig/workerGroupSpecs/0/template/spec/containers/0/resources/limits", {"memory": "much"}),
        ("spec/rayClusterConfig/workerGroupSpecs/0/template/spec/containers/0/readinesProbe", {}),
        ("spec/rayClusterConfig/workerGroupSpecs/0/template/spec/containers/0/ports", [{"name": "a"}]),
        ("spec/rayClusterConfig/authOptions/mode", "none"),
        ("spec/rayClusterConfig/autoscalerOptions/version", "v3"),
        ("spec/rayClusterConfig/headGroupSpec/rayStartParams", {"num-cpus": 0}),
        ("spec/rayClusterConfig/headGroupSpec", {}),
    ],
)
def test_the_schema_finds_mistakes(path: str, value: Any, validator: jsonschema.Draft202012Validator):
    found = problems(validator, change(Documents(FILES[0]).service, path, value))
    assert found and path.split("/")[1] in "".join(found)


def test_the_schema_takes_what_kubernetes_takes(validator: jsonschema.Draft202012Validator):
    limits = "spec/rayClusterConfig/workerGroupSpecs/0/template/spec/containers/0/resources/limits"
    for value in ({"cpu": 2}, {"cpu": "500m"}, {"memory": "1.5Gi"}, {"example.com/device": 1}):
        assert problems(validator, change(Documents(FILES[0]).service, limits, value)) == []


def test_our_loader_takes_the_embedded_manifest(documents: Documents):
    manifest = documents.manifest
    assert manifest.http.host == "0.0.0.0"
    assert (manifest.device == "cuda") == (manifest.attention.gpus > 0)
    assert None not in (manifest.attention.threads, manifest.experts.threads), (
        "the default is the cores of the node, of which a pod may use fewer"
    )


def test_serve_builds_our_application_from_it(documents: Documents):
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(documents.serve)
    (application,) = config.applications
    module, name = application.import_path.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert [d.name for d in application.deployments] == ["ingress"]
    assert (config.http_options.host, config.http_options.port) == (
        documents.manifest.http.host,
        documents.manifest.http.port,
    )
    # The file is the mounted key of the ConfigMap, in every pod.
    folder, _, key = application.args["manifest"].rpartition("/")
    assert set(application.args) == {"manifest"} and key in documents.config_map["data"]
    for pod in documents.pods():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted[folder]["configMap"]["name"] == documents.config_map["metadata"]["name"]
        assert documents.manifest.model == "tiny" or any(
            documents.manifest.model.startswith(f"{path}/") for path in mounted
        )


def test_every_pod_has_the_keys_from_a_secret(documents: Documents):
    folder, _, file = str(documents.manifest.http.keys).rpartition("/")
    for pod in documents.pods():
        (volume,) = (volume for volume in pod["volumes"] if "secret" in volume)
        mounts = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == volume["name"]]
        # Mounted as a folder: a file by itself (subPath) would stay as it was when the Secret changes.
        told = [(mount["mountPath"], mount["readOnly"], "subPath" in mount) for mount in mounts]
        assert told == [(folder, True, False)]
        created = f"kubectl create secret generic {volume['secret']['secretName']} --from-file={file}"
        assert created in documents.text


def test_the_cluster_is_as_isotherm_needs_it(documents: Documents):
    cluster, spec = documents.cluster, documents.service["spec"]
    assert spec["upgradeStrategy"]["type"] in ("NewCluster", "None")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "gcsFaultToleranceOptions" in documents.text
    assert cluster["rayVersion"] == "2.60.0"
    assert {name: group["labels"] for name, group in documents.groups.items()} == {
        "attention": {"role": "attention"},
        "expert": {"role": "expert"},
    }
    assert documents.manifest.attention.labels == {"role": "attention"} and documents.manifest.experts.labels == {
        "role": "expert"
    }
    for pod in documents.pods():
        (container,) = pod["containers"]
        assert container["image"] == "IMAGE-WITH-ISOTHERM"
        assert container["resources"]["limits"] == container["resources"]["requests"]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        ours = {name: value for name, value in NODE_ENVIRONMENT.items() if name != "RAY_AUTH_MODE"}
        assert environment == ours, "KubeRay sets the mode of authentication"


def test_traffic_comes_where_the_cluster_is_ready(documents: Documents):
    (container,) = documents.groups["attention"]["template"]["spec"]["containers"]
    probe = container["readinessProbe"]["httpGet"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (probe["path"], ports[probe["port"]]) == ("/ready", documents.manifest.http.port)
    assert "livenessProbe" not in container, "a restart of Serve must not cost a shard's KV cache"
    (ingress,) = documents.serve["applications"][0]["deployments"]
    assert ingress["ray_actor_options"]["label_selector"] == documents.groups["attention"]["labels"]


@pytest.mark.parametrize(("role", "count"), [("attention", "shards"), ("expert", "groups")])
def test_the_pods_have_room_for_the_workers(documents: Documents, role: str, count: str):
    section: Any = documents.manifest.attention if role == "attention" else documents.manifest.experts
    limits, group = documents.limits(role), documents.groups[role]
    fit = [int(float(limits["cpu"]) // section.cpus)]
    if section.gpus:
        fit.append(int(limits["nvidia.com/gpu"] // section.gpus))
    if section.memory:
        fit.append(quantity(limits["memory"]) // section.memory)
    needed = -(-getattr(section, count) // min(fit))
    assert min(fit) >= 1 and group["minReplicas"] <= needed <= group["replicas"] <= group["maxReplicas"]
    assert section.threads <= float(limits["cpu"])


@pytest.mark.parametrize(("role", "kind"), [("attention", "attention_shards"), ("expert", "expert_groups")])
def test_the_autoscalers_workers_find_pods(documents: Documents, role: str, kind: str):
    section: Any = documents.manifest.attention if role == "attention" else documents.manifest.experts
    scaling, limits, group = (
        getattr(documents.manifest.autoscaling, kind),
        documents.limits(role),
        documents.groups[role],
    )
    assert documents.manifest.autoscaling.mode == "on"
    if scaling.max is None:
        return
    per_pod = min(
        int(float(limits["cpu"]) // section.cpus),
        int(limits["nvidia.com/gpu"] // section.gpus) if section.gpus else 10**6,
    )
    assert scaling.max <= per_pod * group["maxReplicas"] < 2 * scaling.max + per_pod
    assert (scaling.min or getattr(section, "shards" if role == "attention" else "groups")) >= group["minReplicas"]


# --- against the model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("DeepSeek-V3")
    (path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    (path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"model.norm.weight": "model-00001-of-00163.safetensors"}}'
    )
    return path


def weights(report: Report, prefix: str) -> int:
    return max(row["weight_bytes"] for row in report.placement if row["worker"].startswith(prefix))


def test_deepseek_v3_fits(documents: Documents, v3: Path):
    manifest = documents.manifest
    # Also: the KV cache holds max_model_len tokens
    report = inspect_model(bundled_model() if manifest.model == "tiny" else v3, manifest)
    if manifest.model == "tiny":
        return
    experts = sum(row.get("experts", 0) for row in report.placement)
    each = report.bytes_by_part[Part.ROUTED_EXPERTS.value] // experts
    shard, group = (
        weights(report, "attention") + manifest.engine.kv_memory,
        weights(report, "expert") + manifest.experts.spare_slots * each,
    )
    assert shard < 0.85 * GPU_BYTES
    assert group < (0.85 * GPU_BYTES if manifest.experts.gpus else 0.95 * manifest.experts.memory)
    # The figures in the comments.
    for prefix, pattern in (("expert", r"(\d+) GB a group"), ("attention", r"(\d+) GB a shard")):
        assert all(int(told) == round(weights(report, prefix) / 1e9) for told in re.findall(pattern, documents.text))


def test_two_nodes_of_eight_gpus():
    documents = Documents(FOLDER / "h100.yaml")
    pods = [
        documents.limits(role)["nvidia.com/gpu"]
        for role, group in documents.groups.items()
        for _ in range(group["maxReplicas"])
    ]
    assert sum(pods) == 16 and all(8 % gpus == 0 for gpus in pods)
    manifest = documents.manifest
    assert manifest.attention.shards * manifest.attention.gpus + manifest.experts.groups * manifest.experts.gpus == 16


def test_experts_on_cpus_have_no_gpu():
    documents = Documents(FOLDER / "experts-on-cpu.yaml")
    assert documents.manifest.experts.gpus == 0 and "nvidia.com/gpu" not in documents.limits("expert")
    assert documents.limits("attention")["nvidia.com/gpu"] == documents.manifest.attention.shards
