"""Serves the bundled model and runs the tests of this folder against it, with the Python of an environment in which the
software of others is (requirements.txt).

python tests/clients/run.py PYTHON [pytest's arguments]"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "helpers"))

from served import Served  # noqa: E402


def main() -> int:
    python, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, Served({}, Path(folder)) as server:
        # An environment of its own, from which nothing of ours is imported.
        command = [
            python,
            "-m",
            "pytest",
            "-c",
            os.devnull,
            f"--rootdir={HERE}",
            f"--confcutdir={HERE}",
            *arguments,
            str(HERE),
        ]
        return subprocess.run(command, env=os.environ | {"ISOTHERM_URL": f"{server.url}/v1"}, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
