"""A stream whose reader has gone."""

from __future__ import annotations

import os
import subprocess
import sys


def test_what_nobody_reads_is_no_error():
    code = (
        "import sys; from isotherm.cluster.supervise.terminal import outlast_terminal; outlast_terminal()\n"
        "from rich.console import Console\n"
        "sys.stdin.readline()\n"
        "for _ in range(3000): print('x' * 100)\n"
        "Console().print('y'); print('z', file=sys.stderr); sys.stdout.flush()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(30) == 0


def test_what_somebody_reads_arrives():
    code = (
        "import sys; from isotherm.cluster.supervise.terminal import outlast_terminal; outlast_terminal()\n"
        "print('a', sys.stdout.isatty(), sys.stdout.fileno()); print('b', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env=os.environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a False 1\n", "b\n")
