"""What is refused before anything is started."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest
from deepseek_checkpoints import make_checkpoint
from ray.serve._private.http_util import set_socket_reuse_port

from isotherm.cluster.deploy.preflight import check_port, check_servable, hold_port
from isotherm.cluster.manifest import Manifest, ManifestError, parse_manifest
from isotherm.cluster.model.checkpoint import CheckpointError
from isotherm.cluster.model.path import bundled_model
from isotherm.cluster.text.tokenizer_files import TokenizerError


def test_the_default_can_be_served():
    check_servable(Manifest(), bundled_model())


def test_cuda_is_refused_where_the_workers_machine_has_no_gpu():
    manifest = parse_manifest({"device": "cuda", "attention": {"gpus": 1}})
    with pytest.raises(ManifestError, match="device is cuda, but there is no driver; or use device: cpu"):
        check_servable(manifest, bundled_model(), lambda: "there is no driver")
    check_servable(manifest, bundled_model(), lambda: None)
    check_servable(manifest, bundled_model())  # the workers will be elsewhere
    check_servable(Manifest(), bundled_model(), lambda: "there is no driver")


@pytest.mark.parametrize(("fields", "words"), [
    ({"device": "cuda"}, "no worker reserves a GPU; set attention.gpus or experts.gpus"),
    ({"device": "cuda", "kernels": "native", "attention": {"gpus": 1}}, "kernels is native, which computes on the CPU"),
    ({"device": "cuda", "kernels": "triton", "attention": {"gpus": 1}},
     r"experts\.gpus is 0; auto takes triton for the workers with GPUs alone"),
    ({"kernels": "triton"}, "kernels is triton, which needs device: cuda"),
    ({"kernels": "reference", "isa": "avx2"}, "isa is avx2, which is for native kernels, but kernels is reference"),
])  # fmt: skip
def test_kernels_and_devices_that_do_not_fit_are_refused(fields: dict, words: str):
    with pytest.raises(ManifestError, match=words):
        check_servable(parse_manifest(fields), bundled_model(), lambda: None)


def test_workers_without_a_gpu_compute_on_the_cpu():
    manifest = parse_manifest({"device": "cuda", "attention": {"gpus": 0.5}})
    assert (manifest.worker_device(manifest.attention.gpus), manifest.worker_device(manifest.experts.gpus)) == (
        "cuda",
        "cpu",
    )
    assert Manifest().worker_device(1) == "cpu"


def test_a_context_that_does_not_fit_the_model_is_refused():
    with pytest.raises(ManifestError, match=r"engine\.max_model_len is 100000"):
        check_servable(parse_manifest({"engine": {"max_model_len": 100000}}), bundled_model())


def test_a_checkpoint_without_a_tokenizer_or_a_tensor_is_refused(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not found"):
        check_servable(Manifest(), make_checkpoint(tmp_path / "a"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        check_servable(
            Manifest(), make_checkpoint(tmp_path / "b", change=lambda tensors: tensors.pop("model.norm.weight"))
        )


def test_a_taken_port_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            with pytest.raises(
                ManifestError, match=f"nothing can listen on {host} port {port}: Address already in use.*--port"
            ):
                check_port(host, port)
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "a" * 300, "\u2603.invalid"])
def test_a_host_that_is_not_here_is_refused(host: str):
    with pytest.raises(ManifestError, match=r"http\.host|listen on 192\.0\.2\.1"):
        check_port(host, 8000)


def test_nobody_gets_a_held_port_but_a_proxy_of_serves():
    """Ray's processes ask for any port, and one of them had the front door's before Serve could listen there."""
    host = "127.0.0.1"
    with hold_port(host, 0) as held:
        port = held.getsockname()[1]
        with pytest.raises(ManifestError, match="Address already in use"):
            check_port(host, port)
        for asked in ([], [socket.SO_REUSEADDR]):
            with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
                for option in asked:
                    other.setsockopt(socket.SOL_SOCKET, option, 1)
                other.bind((host, port))
        with pytest.raises(ConnectionRefusedError):  # it listens to nothing
            socket.create_connection((host, port))
        with socket.socket() as proxy:
            assert set_socket_reuse_port(proxy)  # what a proxy of Serve's calls
            proxy.bind((host, port))
            proxy.listen()
            proxy.settimeout(5)
            for _ in range(20):  # and it has all of them
                with socket.create_connection((host, port)):
                    proxy.accept()[0].close()
    check_port(host, port)


def test_an_address_of_the_kind_that_serve_binds_is_checked(monkeypatch: pytest.MonkeyPatch):
    """A name may mean an IPv6 address too, and Serve takes the other. A machine may have no IPv6."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ManifestError, match="nothing can listen on localhost"):
            check_port("localhost", taken.getsockname()[1])
    make = socket.socket

    def without_ipv6(family: int, kind: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return make(family, kind)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    with pytest.raises(ManifestError, match="nothing can listen on ::1 port 8000: Address family not supported"):
        check_port("::1", 8000)
    hold_port("localhost", 0).close()
