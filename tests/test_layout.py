"""Which room may import which, that everything is importable by its isotherm name only, and how long things may be.

A room is a folder of `cluster` or `actors`, a module that stands in one of them itself, or `kernels` as a whole. The
table is the rule: it holds no circle, so whatever is needed by two rooms lies in a third one below both.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from isotherm.cluster.client.in_process import SERVER

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cluster", "actors", "kernels", "manifests")

BASE = {
    "cluster.background", "cluster.errors", "cluster.jsontypes", "cluster.logs", "cluster.loopback", "cluster.within"
}  # fmt: skip
ROOMS: dict[str, set[str]] = {
    "kernels": set(),
    "manifests": set(),
    # The ground of cluster: what is said, what a model and a text are, and decisions about steps and placements.
    "cluster.background": set(),
    "cluster.errors": set(),
    "cluster.jsontypes": set(),
    "cluster.logs": set(),
    "cluster.loopback": set(),
    "cluster.machine_memory": {"kernels"},
    "cluster.proxies": {"cluster.errors", "cluster.loopback"},
    "cluster.within": set(),
    "cluster.messages": {"cluster.errors", "cluster.jsontypes", "cluster.logs", "cluster.model"},
    "cluster.text": {"cluster.errors", "cluster.jsontypes"},
    "cluster.model": {"cluster.errors", "cluster.jsontypes", "cluster.proxies", "cluster.text", "manifests"},
    "cluster.engine": {"cluster.errors", "cluster.messages"},
    "cluster.placement": {"cluster.jsontypes", "cluster.messages"},
    "cluster.control": {*BASE, "cluster.messages", "cluster.placement"},
    "cluster.manifest_text": set(),
    "cluster.manifest_values": set(),
    "cluster.manifest": {
        "cluster.control", "cluster.engine", "cluster.errors", "cluster.logs", "cluster.manifest_text",
        "cluster.manifest_values", "cluster.messages", "cluster.model", "cluster.text",
    },
    "cluster.served_model": {"cluster.manifest", "cluster.model"},
    # Where tensors live.
    "actors.pulse": set(),
    "actors.links": {*BASE, "cluster.messages", "kernels"},
    "actors.models": {"cluster.engine", "cluster.jsontypes", "cluster.model", "kernels"},
    "actors.worker": {
        "actors.links", "actors.models", "cluster.jsontypes", "cluster.logs", "cluster.messages", "cluster.model",
        "kernels",
    },
    "actors.attention": {
        *BASE, "actors.links", "actors.models", "actors.pulse", "actors.worker",
        "cluster.engine", "cluster.messages", "cluster.placement",
        "cluster.text",  # a grammar is about text: masks are made of it and of the tokenizer
        "kernels",
    },
    "actors.experts": {
        *BASE, "actors.links", "actors.models", "actors.pulse", "actors.worker", "cluster.machine_memory",
        "cluster.messages", "cluster.model", "kernels",
    },
    "actors.preload": {"actors.attention", "actors.experts", "cluster.background"},
    "actors.local": {
        "actors.attention", "actors.experts", "actors.links", "actors.models",
        "cluster.engine", "cluster.messages", "cluster.model", "cluster.placement", "cluster.text", "kernels"
    },
    # The front door, and what is decided about the cluster.
    # What is let in goes by the same rule at the front door and at each shard.
    "cluster.api": {*BASE, "cluster.engine", "cluster.messages", "cluster.text"},
    "cluster.client": {"cluster.errors", "cluster.jsontypes", "cluster.proxies"},
    "cluster.front_door": {"cluster.api", "cluster.background", "cluster.manifest", "cluster.model", "cluster.text"},
    # Everything in one process, without Ray. The client loads it by its name (cluster/client/in_process.py).
    "cluster.local": {
        *BASE, "actors.attention", "actors.local", "actors.models", "cluster.api", "cluster.front_door",
        "cluster.manifest", "cluster.messages", "cluster.model", "cluster.observe", "cluster.served_model", "kernels",
    },
    "cluster.routing": {*BASE, "cluster.api", "cluster.messages"},
    "cluster.autoscale": {*BASE, "cluster.manifest", "cluster.messages", "cluster.model", "cluster.placement"},
    "cluster.observe": {
        *BASE, "cluster.api", "cluster.autoscale", "cluster.manifest", "cluster.messages", "cluster.placement"
    },
    # On Ray.
    "cluster.on_ray": {*BASE, "cluster.messages"},
    "cluster.supervise": {*BASE, "cluster.manifest", "cluster.on_ray"},
    "cluster.deploy": {
        *BASE, "actors.attention", "actors.experts", "actors.links", "cluster.api", "cluster.autoscale",
        "cluster.control", "cluster.engine", "cluster.front_door", "cluster.machine_memory", "cluster.manifest",
        "cluster.messages", "cluster.model", "cluster.observe", "cluster.on_ray", "cluster.placement",
        "cluster.routing", "cluster.supervise", "cluster.text", "kernels",
    },
    "cluster.doctor": {
        *BASE, "cluster.deploy", "cluster.machine_memory", "cluster.manifest", "cluster.on_ray", "cluster.text",
        "kernels",
    },
    "cluster.cli": {
        *BASE, "actors.attention", "actors.experts", "actors.links", "actors.local", "actors.models", "cluster.api",
        "cluster.client", "cluster.control", "cluster.deploy", "cluster.doctor", "cluster.engine",
        "cluster.machine_memory", "cluster.manifest", "cluster.messages", "cluster.model", "cluster.on_ray",
        "cluster.placement", "cluster.served_model", "cluster.supervise", "cluster.text", "kernels",
    },
}  # fmt: skip
USE_RAY = {"cluster.on_ray", "cluster.deploy"}
WITHOUT_TENSORS = {
    "cluster.background",
    "cluster.errors",
    "cluster.messages",
    "cluster.engine",
    "cluster.model",
    "cluster.routing",
    "cluster.control",
}


def sources(package: str) -> list[Path]:
    return sorted(p for p in (ROOT / package).rglob("*.py") if "__pycache__" not in p.parts)


SOURCES = [path for package in PACKAGES for path in sources(package)]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    parts = ("isotherm", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str:
    """ "isotherm.cluster.api.app" → "cluster.api"."""
    parts = name.split(".")[1:]
    return parts[0] if parts[0] in ("kernels", "manifests") else ".".join(parts[:2])


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def import_statements(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


@cache
def imported(path: Path) -> frozenset[str]:
    """Full names of modules. `from a import b` counts as a.b where a is a package with nothing in it."""
    names: set[str] = set()
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif node.module in ("isotherm", "isotherm.cluster", "isotherm.actors"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif node.module:
            names.add(node.module)
    return frozenset(names)


def test_there_is_something_to_check():
    some = {
        "cluster/engine/scheduler.py",
        "actors/models/deepseek_v3.py",
        "kernels/reference.py",
        "manifests/__init__.py",
    }
    assert some <= {label(p) for p in SOURCES}
    assert not (ROOT / "__init__.py").exists() and not (ROOT / "isotherm" / "__init__.py").exists(), (
        "isotherm is a namespace"
    )
    assert {p.name: p.readlink() for p in (ROOT / "isotherm").iterdir()} == {
        name: Path("..") / name for name in PACKAGES
    }


def found(paths: Iterable[Path], look: Callable[[Path], list[str]]) -> list[str]:
    """What `look` says of each file. One test for all of them: thousands of small ones take longer to begin than to
    run."""
    return [f"{label(path)}: {fault}" for path in paths for fault in look(path)]


def out_of_its_room(path: Path) -> list[str]:
    room = room_of(module_name(path))
    rooms = {room_of(name) for name in imported(path) if name.startswith("isotherm.")} - {room}
    faults = [f"{room} may not import {other}" for other in sorted(rooms - ROOMS[room])]
    if room not in USE_RAY and any(name.split(".")[0] == "ray" for name in imported(path)):
        faults.append(f"only {sorted(USE_RAY)} use Ray")
    return faults


def test_rooms_import_what_they_may():
    assert not found([p for p in SOURCES if p.parent.name not in PACKAGES or p.name != "__init__.py"], out_of_its_room)


def test_there_is_no_circle():
    """Each room stands above all that it may import."""
    floor: dict[str, int] = {}
    while len(floor) < len(ROOMS):
        ready = {room for room, below in ROOMS.items() if room not in floor and below <= set(floor)}
        assert ready, f"a circle among {sorted(set(ROOMS) - set(floor))}"
        floor |= dict.fromkeys(ready, max(floor.values(), default=0) + 1)


def test_decisions_need_no_tensors():
    def tensors(path: Path) -> list[str]:
        return sorted({"torch", "starlette"} & {name.split(".")[0] for name in imported(path)})

    assert not found([p for p in SOURCES if room_of(module_name(p)) in WITHOUT_TENSORS], tensors)


def test_packages_are_inert():
    """A docstring at most: an import here would run for every module of the package. The client's names are what users
    import."""

    def inert(path: Path) -> bool:
        return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in tree(path).body)

    assert [label(p) for p in SOURCES if p.name == "__init__.py" and not inert(p)] == ["cluster/client/__init__.py"]


def otherwise_named(path: Path) -> list[str]:
    faults = []
    for node in import_statements(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            faults.append(f"line {node.lineno}: relative import")
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        ours = [name for name in names if name.split(".")[0] in PACKAGES]
        faults += [f"line {node.lineno}: {name} must be isotherm.{name}" for name in ours]
    return faults


def test_imports_are_absolute_and_by_the_isotherm_names():
    assert not found([*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], otherwise_named)


def test_what_is_against_the_rules_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wrong = tmp_path / "cluster" / "errors" / "wrong.py"
    wrong.parent.mkdir(parents=True)
    wrong.write_text("import ray\nfrom . import x\nfrom cluster.api import y\nimport isotherm.cluster.api.z\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert found([wrong], out_of_its_room) == [
        "cluster/errors/wrong.py: cluster.errors may not import cluster.api",
        "cluster/errors/wrong.py: only ['cluster.deploy', 'cluster.on_ray'] use Ray",
    ]
    assert found([wrong], otherwise_named) == [
        "cluster/errors/wrong.py: line 2: relative import",
        "cluster/errors/wrong.py: line 3: cluster.api must be isotherm.cluster.api",
    ]


# --- sizes ------------------------------------------------------------------------------------------

FILE_LINES, FUNCTION_LINES, COLUMNS = 400, 60, 120
CODE = [*SOURCES, *sorted(p for p in (ROOT / "kernels" / "native" / "csrc").rglob("*") if p.is_file())]


def is_one_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether triton.jit compiles it, as one piece."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def over_the_limits(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    found = [f"{len(lines)} lines"] if len(lines) > FILE_LINES else []
    found += [f"line {i} has {len(line)} columns" for i, line in enumerate(lines, 1) if len(line) > COLUMNS]
    for node in ast.walk(tree(path)) if path.suffix == ".py" else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_one_kernel(node):
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            found += [f"{node.name} has {count} lines"] if count > FUNCTION_LINES else []
    return found


def test_files_functions_and_lines_are_short():
    """At most 400 lines a file, 60 a function, 120 columns a line."""
    assert not found(CODE, over_the_limits)


def test_the_limits_are_seen(tmp_path: Path):
    """That what counts, counts; and that a kernel may be long."""
    body = "".join(f"    x{i} = {i}\n" for i in range(FUNCTION_LINES))
    (tmp_path / "long.py").write_text(
        f"async def f():\n{body}@triton.jit(do_not_specialize=['n'])\ndef kernel(n):\n{body}"
    )
    assert over_the_limits(tmp_path / "long.py") == [f"f has {FUNCTION_LINES + 1} lines"]
    (tmp_path / "wide.h").write_text("x\n" * FILE_LINES + "é" * COLUMNS + "\n" + "x" * (COLUMNS + 1))
    assert over_the_limits(tmp_path / "wide.h") == [
        f"{FILE_LINES + 2} lines",
        f"line {FILE_LINES + 2} has {COLUMNS + 1} columns",
    ]
    assert {label(p) for p in CODE} >= {"cluster/deploy/fleet.py", "kernels/native/csrc/bind.cpp"}


# --- in processes ---------------------------------------------------------------------------------


def is_ours(name: str) -> bool:
    """Whether a bare top-level import would find a folder of this repository (its virtual environment, which may lie in
    it, is not)."""
    spec = importlib.util.find_spec(name)
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    found = [Path(p).resolve() for p in places if p]
    return any(p.is_relative_to(ROOT) and not p.is_relative_to(Path(sys.prefix).resolve()) for p in found)


@pytest.mark.parametrize("name", PACKAGES)
def test_no_bare_name_is_ours_in_the_tests_own_process(name: str):
    assert not is_ours(name)


def run(*command: str, cwd: Path = ROOT) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_transformers_works_from_the_repository_root(tmp_path: Path):
    """transformers asks find_spec("kernels") for the distribution of that name, and imports what it finds. As `make
    test` runs it: the pytest command (which, unlike `python -m pytest`, leaves the working directory off sys.path)."""
    inner = tmp_path / "test_inner.py"
    inner.write_text(
        "import importlib.util, pathlib, sys\n"
        "def test_inner():\n"
        "    spec = importlib.util.find_spec('kernels')\n"
        "    assert spec is None or pathlib.Path(spec.origin or '/').parent != "
        f"pathlib.Path({str(ROOT / 'kernels')!r}), spec\n"
        f"    assert spec is None or {str(ROOT / 'kernels')!r} not in list(spec.submodule_search_locations or []), "
        "spec\n"
        "    import transformers\n"
        "    from transformers import DeepseekV3ForCausalLM\n"
        "    import isotherm.kernels.ops\n"
    )
    pytest_command = Path(sys.executable).with_name("pytest")
    run(
        str(pytest_command),
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(inner),
    )


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded after `code` ran in a fresh process (outside the repository, so that nothing is
    found by accident)."""
    report = "import sys; print(chr(10).join(sorted({m.split('.')[0] for m in sys.modules})))"
    return set(run(sys.executable, "-c", f"{code}\n{report}", cwd=ROOT.parent).split())


def test_the_client_needs_httpx_and_pydantic_alone():
    others = {"torch", "ray", "transformers", "numpy", "starlette", "uvicorn", "yaml", "pyarrow"}
    assert not others & modules_after("import isotherm.cluster.client")


def test_one_module_is_loaded_by_its_name():
    """What the table above cannot see. There is one way around it, and it leads to a module that is there."""
    by_name = [label(path) for path in SOURCES if "import_module(" in path.read_text()]
    assert by_name == ["cluster/client/in_process.py"]
    assert SERVER in map(module_name, SOURCES) and room_of(SERVER) == "cluster.local"


def test_decisions_load_neither_torch_nor_ray():
    names = [module_name(p) for p in SOURCES if room_of(module_name(p)) in WITHOUT_TENSORS]
    assert len(names) > 5
    assert not {"torch", "ray", "starlette"} & modules_after("\n".join(f"import {name}" for name in names))
