"""`isotherm bench served` in its shortest form: it starts a cluster, measures it beside the engine in one process, and
ends it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import shared_memory
from served import ISOTHERM

pytestmark = pytest.mark.long


def test_the_bundled_model_is_measured_through_http_and_offline():
    """As a shell starts it in the background, with SIGINT ignored."""
    folders = set(Path(tempfile.gettempdir()).glob("isotherm-*"))
    command = ["bench", "served", "tiny", "--streams", "2", "--output-tokens", "256", "--rounds", "1",
               "--links", "auto", "--json"]  # fmt: skip
    shell = ["sh", "-c", 'trap "" INT; exec "$0" "$@"', ISOTHERM, *command]
    process = subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    family: dict[int, psutil.Process] = {}
    files: set[str] = set()

    def look() -> None:
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family.update((p.pid, p) for p in psutil.Process(process.pid).children(recursive=True))
            files.update(shared_memory.files(family.values()))
            time.sleep(0.2)

    looking = threading.Thread(target=look)
    looking.start()
    out, errors = process.communicate(timeout=200)
    looking.join()
    assert process.returncode == 0, errors
    (figure,) = json.loads(out)["figures"]
    assert (figure["links"], figure["streams"]) == ("auto", 2)
    assert all(len(figure[side]) == 1 and figure[side][0] > 0 for side in ("offline", "streamed", "whole"))
    assert figure["streamed_ratio"] == figure["streamed_median"] / figure["offline_median"]
    assert min(figure["first_token_ms"], figure["token_ms"]) > 0
    _, alive = psutil.wait_procs(list(family.values()), timeout=10)
    assert len(family) > 5 and alive == [] and shared_memory.still_there(files) == []
    assert set(Path(tempfile.gettempdir()).glob("isotherm-*")) <= folders
