"""Processes below this one, found and ended by pid, orphans too."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

from isotherm.cluster.supervise.processes import runs_as

RUN = """
import json, os, subprocess, sys, time
from isotherm.cluster.supervise.processes import adopt_orphans, below, end_all_below, titled
assert adopt_orphans()
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
stubborn = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"]
# A parent that leaves two children, one in a session of its own, and dies.
parent = "import subprocess; [subprocess.Popen(c, start_new_session=s) for c, s in ((%r, False), (%r, True))]"
parent %= (sleep, stubborn)
subprocess.run([sys.executable, "-c", parent])
here = subprocess.Popen(sleep)
brief = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
pids = {p.pid for p in below(os.getpid())}
assert len(pids) == 4, pids
assert list(titled(os.getpid(), [sys.executable])) == [sys.executable]
begin = time.monotonic()
left, statuses = end_all_below(os.getpid(), 1.0, 5.0)
print(json.dumps({"pids": sorted(pids), "left": left, "seconds": time.monotonic() - begin,
                  "statuses": [statuses[here.pid], statuses[brief.pid]], "below": len(below(os.getpid()))}))
here.returncode = brief.returncode = 0
"""


DEEP = """
import os, subprocess, sys, time
from isotherm.cluster.supervise.processes import adopt_orphans, below, end_all_below
adopt_orphans()
nest = ("import os, sys, time\\nfor _ in range(int(sys.argv[1])):\\n    if os.fork(): break\\n"
        "os.write(1, b'%d\\\\n' % os.getpid())\\ntime.sleep(60)")
chains = [subprocess.Popen([sys.executable, "-c", nest, "12"], stdout=subprocess.PIPE, text=True) for _ in range(4)]
pids = [int(chain.stdout.readline()) for chain in chains for _ in range(13)]
left, _ = end_all_below(os.getpid(), 0.0, 10.0)
print(left, [pid for pid in pids if os.path.exists(f"/proc/{pid}")], below(os.getpid(), ended=True))
for chain in chains: chain.returncode = 0
"""


def test_parents_that_die_hide_no_children():
    done = subprocess.run([sys.executable, "-c", DEEP], capture_output=True, text=True, timeout=60, cwd=Path("/"))
    assert (done.returncode, done.stdout) == (0, "[] [] []\n"), done.stderr


def test_one_that_has_ended_and_was_not_asked_how_does_not_run():
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert runs_as(process.pid)
    process.stdin.close()
    deadline = time.monotonic() + 20
    while runs_as(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs_as(process.pid) and psutil.pid_exists(process.pid), "a zombie"
    process.wait()
    assert not runs_as(process.pid)


def test_orphans_are_adopted_and_ended():
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, timeout=60, cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["left"] == [] and out["below"] == 0
    assert out["statuses"] == [-9, 0], "one was killed when its patience was over, one ended by itself before"
    assert 0.9 < out["seconds"] < 4
    deadline = time.monotonic() + 2
    while (alive := [pid for pid in out["pids"] if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive == []


def test_a_process_whose_parent_has_gone_before_it_asked_does_not_begin():
    code = "from isotherm.cluster.supervise.processes import end_with_parent; end_with_parent(1); print('begun')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
