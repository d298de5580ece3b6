"""`isotherm bench served` in its shortest form: it starts a cluster, measures it beside the engine in one process, and ends it."""

from __future__ import annotations

import json
import os
import subprocess

from served import ISOTHERM


def test_the_bundled_model_is_measured_through_http_and_offline():
    shared_memory = set(os.listdir("/dev/shm"))
    command = ["bench", "served", "tiny", "--streams", "2", "--output-tokens", "16", "--rounds", "1", "--links", "auto", "--json"]
    done = subprocess.run([ISOTHERM, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (figure,) = json.loads(done.stdout)["figures"]
    assert (figure["links"], figure["streams"]) == ("auto", 2)
    assert all(len(figure[side]) == 1 and figure[side][0] > 0 for side in ("offline", "streamed", "whole"))
    assert figure["streamed_ratio"] == figure["streamed_median"] / figure["offline_median"]
    assert min(figure["first_token_ms"], figure["token_ms"]) > 0
    assert set(os.listdir("/dev/shm")) <= shared_memory
