"""Which kernels a worker gets, and what is refused in words that say what to do."""

from __future__ import annotations

import sys

import pytest
import torch

from isotherm.kernels import select
from isotherm.kernels.errors import KernelsUnavailable, UnknownKernels
from isotherm.kernels.native import backend as native_backend
from isotherm.kernels.native.library import NativeKernelsUnavailable, built_library
from isotherm.kernels.select import cuda_unavailable_reason, select_kernels


def test_the_reference_when_it_is_asked_for():
    chosen = select_kernels("reference", torch.float32)
    assert (chosen.kernels.name, chosen.reason, chosen.kernels.device.type) == (
        "reference",
        "plain torch, as asked for",
        "cpu",
    )


def test_auto_falls_back_to_the_reference_and_says_why(monkeypatch: pytest.MonkeyPatch):
    def unavailable(*_: object, **__: object) -> None:
        raise NativeKernelsUnavailable("no compiler was there")

    monkeypatch.setattr(native_backend, "NativeKernels", unavailable)
    chosen = select_kernels("auto", torch.float32)
    why = "plain torch, since native kernels are not there: no compiler was there"
    assert (chosen.kernels.name, chosen.reason) == ("reference", why)
    with pytest.raises(NativeKernelsUnavailable, match="no compiler"):
        select_kernels("native", torch.float32)


def test_an_instruction_set_is_had_or_refused(monkeypatch: pytest.MonkeyPatch):
    if built_library() is not None:
        assert select_kernels("auto", torch.float32, 1, isa="generic").kernels.instructions == "generic"
    with pytest.raises(KernelsUnavailable, match='isa "avx2" is for native kernels, not for kernels "reference"'):
        select_kernels("reference", torch.float32, isa="avx2")
    with pytest.raises(UnknownKernels, match='isa is "avx"; it must be "auto", "amx", "avx512", "avx2" or "generic"'):
        select_kernels("auto", torch.float32, isa="avx")

    def unavailable(*_: object, isa: str, **__: object) -> None:
        raise NativeKernelsUnavailable(f"this machine has no {isa}")

    monkeypatch.setattr(native_backend, "NativeKernels", unavailable)
    with pytest.raises(NativeKernelsUnavailable, match="this machine has no avx512_bf16"):
        select_kernels("auto", torch.float32, isa="avx512")


@pytest.mark.parametrize("name", ["native", "reference"])
def test_cpu_kernels_are_refused_on_a_gpu(name: str):
    with pytest.raises(
        KernelsUnavailable, match=f'kernels "{name}" compute on the CPU; a worker with device: cuda needs "triton"'
    ):
        select_kernels(name, torch.bfloat16, device="cuda")


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_a_gpu_gets_triton(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU of this test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    chosen = select_kernels(name, torch.bfloat16, device="cuda")
    assert (chosen.kernels.name, chosen.kernels.device.type) == ("triton", "cuda")
    assert chosen.kernels.instructions.startswith("sm_90, Triton 3.")
    assert "a GPU of this test" in chosen.reason and cuda_unavailable_reason() is None


def test_without_a_gpu_triton_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
        select_kernels("auto", torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        select_kernels("triton", torch.bfloat16)


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "isotherm.kernels.triton.backend", None)
    with pytest.raises(KernelsUnavailable, match=r"pip install 'isotherm\[gpu\]'"):
        select_kernels("triton", torch.bfloat16)


@pytest.mark.parametrize(("version", "words"), [(None, "a build without CUDA"), ("13.0", "check the driver")])
def test_why_there_is_no_gpu(version: str | None, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    assert words in (cuda_unavailable_reason() or "")


def test_a_name_that_is_none():
    with pytest.raises(UnknownKernels, match='kernels is "cuda"; it must be "auto", "native", "reference" or "triton"'):
        select_kernels("cuda", torch.bfloat16)
    assert set(select.NAMES) == {"auto", "native", "reference", "triton"}
