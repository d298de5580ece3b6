"""Whether tests of the native library run here: they may be skipped only where it was not built."""

from __future__ import annotations

import sys

import pytest

from isotherm.kernels import native_library, native_ring


def require_native(ring: bool = False) -> None:
    """Call while a test module is imported. Skips the module where no library was built (isotherm installs without a
    compiler), and links in shared memory off Linux. A library that was built must load, with every symbol."""
    if native_library.built_library() is None:
        pytest.skip(
            "the native library was not built: no C++ compiler when isotherm was installed", allow_module_level=True
        )
    if ring and sys.platform != "linux":
        pytest.skip("links in shared memory need Linux", allow_module_level=True)
    (native_ring if ring else native_library).load()
