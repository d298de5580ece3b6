"""A process that nobody needs imports what workers are made of; one that is needed does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

IDLE = """
import sys, threading, time
from isotherm.actors import preload
assert not {"torch", "ray"} & set(sys.modules)
began = time.monotonic()
next(t for t in threading.enumerate() if t.name == "preload").join(60)
workers = {"isotherm.actors.attention.shard", "isotherm.actors.experts.group"}
print(time.monotonic() - began > preload.IDLE_SECONDS - 0.5 and workers <= set(sys.modules))
"""
BUSY = """
import sys, threading, time
from isotherm.actors import preload
time.sleep(preload.SETTLED_SECONDS + preload.IDLE_SECONDS / 2)
import wave
next(t for t in threading.enumerate() if t.name == "preload").join(60)
print("torch" not in sys.modules)
"""


@pytest.mark.parametrize("program", [IDLE, BUSY], ids=["idle", "busy"])
def test_what_a_process_imports(program: str):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
