"""What Python says of the native library's functions against the C++ that defines them: ctypes itself checks
nothing."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from isotherm.kernels.native import exchange, library, signatures
from isotherm.kernels.native.context import Error

NATIVE = Path(__file__).resolve().parents[3] / "kernels" / "native" / "csrc"
SCALARS = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "void": None,
}
DEFINITION = re.compile(r'^(?:ISO_EXPORT|extern "C") ([\w:<> ]+?[ *]+)iso_(\w+)\(([^)]*)\)\s*[{;]', re.M)


def ctype(declared: str) -> type | None:
    """Of "const float* weights" or "int64_t rows"."""
    if "*" in declared:
        return ctypes.c_char_p if declared.split("*")[0].strip() == "const char" else ctypes.c_void_p
    return SCALARS[declared.split()[0]]


def defined() -> dict[str, set[tuple[type | None, tuple[type | None, ...]]]]:
    """Function → what it is declared as, wherever it is."""
    out: dict[str, set[tuple[type | None, tuple[type | None, ...]]]] = {}
    for file in sorted(NATIVE.glob("*.cpp")):
        for result, name, arguments in DEFINITION.findall(file.read_text()):
            types = tuple(ctype(a.strip()) for a in arguments.split(",") if a.strip())
            out.setdefault(name, set()).add((ctype(result), types))
    return out


def test_every_function_has_one_type_in_python_and_in_cpp():
    assert not set(signatures.KERNELS) & set(signatures.LINKS)
    both = signatures.KERNELS | signatures.LINKS
    said = {name: {(result, tuple(types))} for name, (result, types) in both.items()}
    assert len(said) > 40 and said == defined()


@pytest.mark.parametrize("module", [signatures, exchange])
def test_a_short_name_means_one_type_everywhere(module: object):
    """`_F` was float in one module and double in the other."""
    types = {
        "_P": ctypes.c_void_p,
        "_L": ctypes.c_int64,
        "_I": ctypes.c_int,
        "_F": ctypes.c_float,
        "_D": ctypes.c_double,
    }
    assert {name: kind for name, kind in types.items() if getattr(module, name, kind) is not kind} == {}


@pytest.mark.parametrize(("table", "function"), [("KERNELS", "context_destroy"), ("LINKS", "end_close")])
def test_a_library_of_other_sources_is_refused_before_it_is_called(
    monkeypatch: pytest.MonkeyPatch, table: str, function: str
):
    """Arguments that it would take for others end the process without a word."""
    built = library.built_library()
    assert built is not None
    number = signatures.interface()
    monkeypatch.setitem(getattr(signatures, table), function, (None, [ctypes.c_int]))
    assert signatures.interface() != number
    with pytest.raises(library.NativeKernelsUnavailable, match=r"other sources.*reinstall isotherm"):
        library.load.__wrapped__(built)


def test_errors_have_one_number_in_python_and_in_cpp():
    declared = re.search(r"enum Error : int \{(.*?)\}", (NATIVE / "bind.cpp").read_text())
    assert declared is not None
    numbers = {name.replace("_", ""): error.value for name, error in Error.__members__.items()}
    found = {name.upper(): int(number) for name, number in re.findall(r"k(\w+) = (\d+)", declared[1])}
    assert found == {"OK": 0} | numbers
