"""A process that Ray has given no work imports what workers are made of; one that starts or serves does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import sys, threading, time
from isotherm.actors import preload
assert not {{"torch", "ray"}} & set(sys.modules)
preload.is_idle = lambda: {idle}
began = time.monotonic()
time.sleep({pause} * preload.IDLE_SECONDS)
import wave
next(t for t in threading.enumerate() if t.name == "preload").join(60)
workers = {{"torch", "isotherm.actors.attention.shard", "isotherm.actors.experts.group"}}
print(time.monotonic() - began > preload.IDLE_SECONDS - 0.5, workers <= set(sys.modules))
"""


@pytest.mark.parametrize(
    ("idle", "pause", "imports"),
    [(True, 0, True), (True, 0.5, False), (False, 0, False)],
    ids=["idle", "starts", "busy"],
)
def test_what_a_process_imports(idle: bool, pause: float, imports: bool):
    program = PROGRAM.format(idle=idle, pause=pause)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", str(imports)]
