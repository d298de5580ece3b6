"""The modules of the bundled model's recipe, which is a script's and not a package: imported by their bare names, and
forgotten afterwards, as these names belong to others' imports too."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

TINY = Path(__file__).resolve().parents[2] / "manifests" / "tiny"


@contextmanager
def tiny_recipe() -> Iterator[Callable[[str], ModuleType]]:
    before = set(sys.modules)
    sys.path.insert(0, str(TINY))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(TINY))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(TINY)):
                del sys.modules[name]
