"""A stream whose reader has gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


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


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_one_that_the_shell_has_closed_is_no_error(closed: str):
    """And what is started afterwards has one that leads nowhere, not the next file of ours."""
    child = "import os, sys; print('x'); sys.stdout.flush(); print('y', file=sys.stderr); os.fstat(0)"
    code = (
        "import os, subprocess, sys\n"
        "from rich.console import Console\n"
        "from isotherm.cluster.supervise.terminal import outlast_terminal\n"
        "outlast_terminal()\n"
        "reader, writer = os.pipe()\n"
        "print('a'); print('b', file=sys.stderr); Console().print('c'); Console(stderr=True).print('d')\n"
        f"done = subprocess.run([sys.executable, '-c', {child!r}])\n"
        "os.close(writer)\n"
        "sys.exit(done.returncode or min(reader, writer) < 3 or os.read(reader, 9) != b'')\n"
    )
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
