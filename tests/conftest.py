"""Makes tests/helpers importable by its modules' bare names, hypothesis repeatable, and modules independent of one
another.

Not `pythonpath = ["tests"]`: that would make tests/kernels importable as `kernels`, the name of a distribution that
transformers looks for.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from multiprocessing import util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
collect_ignore = ["clients"]  # they have an environment of their own: `make clients`

# No deadline: a busy machine is no failure. The same examples every time: a new failure is due to a change.
settings.register_profile("isotherm", deadline=None, derandomize=True)
settings.load_profile("isotherm")

# What nohup, or a shell's background, has had ignored, children would ignore as well: a handler they do not inherit.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Of two that run modules side by side (pytest-xdist), each has its own folder for temporary files: commands without an
# address go to the cluster that was started last, which is written down there.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    OWN_FOLDER = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix=f"{worker}-")
    tempfile.tempdir = None  # asked for anew
    # After multiprocessing has removed what it made there
    util.Finalize(None, shutil.rmtree, (OWN_FOLDER, True), exitpriority=-200)


# Modules run in an order of their own each time, so that none comes to need what another left. ISOTHERM_ORDER_SEED
# repeats it.
ORDER_SEED = int(os.environ.setdefault("ISOTHERM_ORDER_SEED", str(random.randrange(1_000_000))))  # xdist's workers too


def pytest_report_header() -> str:
    return f"order of the modules: ISOTHERM_ORDER_SEED={ORDER_SEED}"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Every test is one of: `e2e`, by its folder; `slow`, by its own mark; `unit`, all others."""
    if item.path.is_relative_to(Path(__file__).parent / "e2e"):
        item.add_marker("e2e")
    elif item.get_closest_marker("slow") is None:
        item.add_marker("unit")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one module stay together, in its own order."""
    modules = [list(group) for _, group in groupby(items, key=lambda item: item.nodeid.split("::")[0])]
    random.Random(ORDER_SEED).shuffle(modules)
    items[:] = [item for module in modules for item in module]


# When they are first imported, or for each test.
SET_BY_LIBRARIES = {
    "PYTEST_CURRENT_TEST",
    "RAY_CLIENT_MODE",
    "TORCHINDUCTOR_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
}


def _process_state() -> dict[str, Any]:
    """What one module may change under the others."""
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_LIBRARIES}
    handlers = {name.name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    return environment | handlers | {"directory": os.getcwd()}


@pytest.fixture(autouse=True, scope="module")
def leaves_the_process_as_it_was() -> Iterator[None]:
    before = _process_state()
    torch = sys.modules.get("torch")
    threads = None if torch is None else torch.get_num_threads()
    yield
    if torch is not None:
        torch.set_num_threads(threads)  # what each kernel backend sets for itself
    after = _process_state()
    assert {name: after.get(name) for name in before | after if after.get(name) != before.get(name)} == {}


@pytest.fixture(scope="session", autouse=True)
def folder_of_all_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made at once: a test that has another TMPDIR for a while would have it made there, and be gone with it."""
    return tmp_path_factory.getbasetemp()
