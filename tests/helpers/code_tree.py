"""docs/tree.md from the code: `python tests/helpers/code_tree.py` writes it anew."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tree.md"
HEAD = """# The tree, a line a module

Each line is the first sentence of the file's own docstring: `python tests/helpers/code_tree.py` writes this page. Who
may import whom is the table in `tests/test_layout.py`. `isotherm/` holds links to the four folders, so that
`cluster/errors.py` is imported as `isotherm.cluster.errors`.
"""
WIDTH = 120


def first_sentence(module: Path) -> str:
    """Of its docstring; empty where it has none."""
    words = " ".join((ast.get_docstring(ast.parse(module.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.?!]) (?=[A-Z`*\"(])", words, maxsplit=1)[0]


def folders() -> list[Path]:
    found = {
        path.parent for name in ("cluster", "actors", "kernels", "manifests") for path in (ROOT / name).rglob("*.py")
    }
    return sorted(path for path in found if "__pycache__" not in path.parts)


def lines() -> Iterator[str]:
    yield HEAD
    for folder in folders():
        yield f"## `{folder.relative_to(ROOT)}/`\n"
        inside = folder / "__init__.py"
        if inside.exists() and (words := first_sentence(inside)):
            yield textwrap.fill(words, WIDTH) + "\n"
        for module in sorted(folder.glob("*.py")):
            if module.name != "__init__.py":
                yield textwrap.fill(f"- `{module.name}`: {first_sentence(module)}", WIDTH, subsequent_indent="  ")
        yield ""


def tree() -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines())).strip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(tree())
