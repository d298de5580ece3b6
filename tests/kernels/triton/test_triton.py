"""Runs tests/kernels/triton/triton_*.py, each in a process of its own, all at once.

TRITON_INTERPRET must be set before triton is imported, and turns every kernel of the process into interpreted Python:
so neither can tests/kernels/triton/test_triton_aot.py run there, nor may the variable leak into other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent
CASES = ("triton_interpreted.py", "triton_invariance.py", "triton_integers.py", "triton_fp8_cache.py")
Running = dict[str, tuple["subprocess.Popen[bytes]", IO[bytes]]]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started: Running = {}
    for cases in CASES:
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(FOLDER / cases)]
        started[cases] = (
            subprocess.Popen(command, cwd=FOLDER.parents[2], env=environment, stdout=log, stderr=subprocess.STDOUT),
            log,
        )
    yield started
    for process, log in started.values():
        process.kill()
        process.wait()
        log.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cases", CASES)
def test_triton_kernels_in_the_interpreter(running: Running, cases: str) -> None:
    process, log = running[cases]
    code = process.wait(590)
    log.seek(0)
    text = log.read().decode()
    print(text)
    assert code == 0, text


def test_without_the_interpreter_a_cpu_is_refused() -> None:
    import torch

    from isotherm.kernels.triton.backend import TritonKernels
    from isotherm.kernels.triton.base import TritonKernelsUnavailable

    with pytest.raises(TritonKernelsUnavailable, match="TRITON_INTERPRET=1"):
        TritonKernels(torch.bfloat16, "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(TritonKernelsUnavailable, match="no CUDA device"):
            TritonKernels(torch.bfloat16)
