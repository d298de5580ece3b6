"""What is set before Ray is imported: by whom starts a Ray, and by whom joins one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from isotherm.cluster.on_ray import environment as ray_environment
from isotherm.cluster.on_ray.environment import (
    LOCAL_RAY,
    LOOPBACK,
    QUIET,
    keep_from_proxies,
    prepare_attach,
    prepare_local_ray,
)

OURS = ("RAY_", "SERVE_")
NAMES = {*LOCAL_RAY, *QUIET, "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without Ray's variables, a home without a token, no cluster on this machine;
    put back afterwards."""
    monkeypatch.setattr(
        os,
        "environ",
        {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | {"HOME": str(tmp_path)},
    )
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        os.environ.pop(name, None)
    monkeypatch.setattr(ray_environment, "local_address", lambda *_: None)
    return tmp_path


def ray_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(OURS)}


def test_a_local_ray_is_loopback_only_with_a_token():
    prepare_local_ray()
    assert ray_variables() == LOCAL_RAY | QUIET
    assert LOOPBACK.items() <= LOCAL_RAY.items() and LOCAL_RAY["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("name", QUIET)
def test_what_a_local_ray_leaves_out_can_be_had_back(name: str):
    os.environ[name] = "1000"
    prepare_local_ray()
    assert ray_variables() == LOCAL_RAY | QUIET | {name: "1000"}


def test_jobs_find_the_commands_of_this_installation_first(tmp_path: Path):
    """`ray job submit … -- isotherm batch` is a job of a Ray that `.venv/bin/isotherm serve` has started."""
    (tmp_path / "isotherm").write_text("#!/bin/sh")
    (tmp_path / "isotherm").chmod(0o755)
    os.environ["PATH"] = str(tmp_path)
    prepare_local_ray()
    prepare_local_ray()
    folder = Path(sys.executable).parent
    assert os.environ["PATH"] == f"{folder}{os.pathsep}{tmp_path}"
    assert shutil.which("isotherm", path=os.environ["PATH"]) == str(folder / "isotherm")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:6379", "127.1.2.3:6379", "localhost:6379", "[::1]:6379", "ray://127.0.0.1:10001"]
)
def test_a_loopback_address_is_looked_for_on_loopback(address: str):
    assert prepare_attach(address) == address
    assert ray_variables() == LOOPBACK


@pytest.mark.parametrize(
    "address",
    ["10.0.0.5:6379", "head.example:6379", "ray://head.example:10001", "auto", "127example.com:1", "localhost.org:1"],
)
def test_another_address_changes_nothing(address: str):
    assert prepare_attach(address) == address
    assert ray_variables() == {}


def test_without_an_address_it_is_ray_address_and_then_this_machines(monkeypatch: pytest.MonkeyPatch):
    assert prepare_attach(None) is None and ray_variables() == {}
    monkeypatch.setattr(ray_environment, "local_address", lambda: "127.0.0.1:7")
    assert prepare_attach(None) == "127.0.0.1:7"
    os.environ["RAY_ADDRESS"] = "10.0.0.5:6379"
    assert prepare_attach(None) == "10.0.0.5:6379"
    assert prepare_attach("10.0.0.6:6379") == "10.0.0.6:6379"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8265", "http://localhost:8265/", "https://127.0.0.1:8265", "http://[::1]:8265"]
)
def test_the_address_for_ray_jobs_leads_to_this_machines_cluster(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        ray_environment, "local_address", lambda port=None: {None: "127.0.0.1:1", 8265: "127.0.0.1:7"}.get(port)
    )
    os.environ["RAY_ADDRESS"] = url
    assert prepare_attach(None) == "127.0.0.1:7"
    assert ray_variables().items() >= LOOPBACK.items()


@pytest.mark.parametrize(("url", "address"), [
    ("http://127.0.0.1:8265", "127.0.0.1:6379"),  # a Ray that somebody else has started
    ("http://head.example:8265", "head.example:6379"), ("https://head.example", "head.example:6379"),
    ("http://[fd00::5]:8265", "[fd00::5]:6379"), ("http://", "http://"), ("http://x:y", "http://x:y"),
    ("ftp://x:1", "ftp://x:1"), ("ray://x:1", "ray://x:1"),
])  # fmt: skip
def test_elsewhere_it_leads_to_rays_usual_port(url: str, address: str):
    assert prepare_attach(url) == address


def test_loopback_is_never_asked_through_a_proxy():
    os.environ |= {"http_proxy": "http://127.0.0.1:9", "NO_PROXY": "corp.example, 10.0.0.1"}
    prepare_local_ray()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "corp.example,10.0.0.1,127.0.0.1,localhost,::1"
    assert os.environ["http_proxy"] == "http://127.0.0.1:9" and "no_grpc_proxy" not in os.environ
    prepare_local_ray()
    assert os.environ["no_proxy"] == "corp.example,10.0.0.1,127.0.0.1,localhost,::1"


def test_what_grpc_prefers_is_completed_too():
    os.environ |= {"no_grpc_proxy": "10.0.0.1", "no_proxy": "a"}
    keep_from_proxies(["h"])
    names = ("no_grpc_proxy", "no_proxy", "NO_PROXY")
    assert [os.environ[name] for name in names] == ["10.0.0.1,h", "a,h", "a,h"]


def test_a_token_that_is_there_is_used(clean: Path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        os.environ[name] = "/a/secret"
        prepare_attach("10.0.0.5:6379")
        assert os.environ["RAY_AUTH_MODE"] == "token"
        del os.environ[name], os.environ["RAY_AUTH_MODE"]
    (clean / ".ray").mkdir()
    (clean / ".ray" / "auth_token").write_text("secret")
    prepare_attach("10.0.0.5:6379")
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_mode_that_is_set_stays():
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "secret"}
    prepare_attach("10.0.0.5:6379")
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_it_comes_before_ray():
    early = "isotherm.cluster.on_ray.environment, isotherm.cluster.deploy.preflight, isotherm.cluster.cli.main"
    code = f"import sys, {early}; assert 'ray' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
