"""README and docs name only what is there: files, commands, targets of make, pages; and their manifests can be used."""

from __future__ import annotations

import re
from pathlib import Path

import command_page
import pytest
import yaml
from code_tree import PAGE, tree

from isotherm.cluster.cli.main import app
from isotherm.cluster.manifest import parse_manifest
from isotherm.cluster.model.registry import FAMILIES
from isotherm.cluster.on_ray.environment import NODE_ENVIRONMENT, QUIET

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("actors", "cluster", "docs", "kernels", "manifests", "tests", ".ci")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code(text: str) -> list[str]:
    """What stands between backticks, and the lines of blocks."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*re.findall(r"`([^`]+)`", prose), *(line for block in blocks for line in block.splitlines())]


@pages
def test_files_that_are_named_are_there(page):
    found = re.findall(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w/?)", page.read_text())
    missing = [name for name in found if "NAME" not in name and not (ROOT / name).exists()]
    assert missing == []


@pages
def test_pages_that_are_linked_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pages
def test_sections_that_are_linked_are_there(page):
    for target, section in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target if target else page).read_text()
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert section in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pages
def test_commands_that_are_named_are_there(page):
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in code(page.read_text()):
        for command in re.findall(r"(?:^|[\s$])isotherm ([a-z]+)\b", words):
            assert command in commands, words
        for target in re.findall(r"(?:^|[\s$])make ([a-z][\w-]*)", words):
            assert target in targets, words


def test_manifests_of_the_docs_can_be_used():
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/manifest.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        parse_manifest(yaml.safe_load(block))


def test_the_tree_is_that_of_the_code():
    assert PAGE.read_text() == tree(), "python tests/helpers/code_tree.py writes it"


def test_the_environment_of_a_ray_of_ones_own_is_that_of_the_code():
    told = {row[0].strip("`"): row[1].strip("`") for row in rows((ROOT / "docs/operations.md").read_text(), "variable")}
    assert told == NODE_ENVIRONMENT


def test_what_a_local_ray_leaves_out_is_that_of_the_code():
    table = rows((ROOT / "docs/operations.md").read_text(), "of a local Ray")
    assert {row[0].strip("`"): row[1].split("`")[1] for row in table} == QUIET


# --- models ---------------------------------------------------------------------------------------


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the one table of a page whose head begins so."""
    (table,) = re.findall(rf"^\| {re.escape(head)} .*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def full_names(cell: str) -> set[str]:
    """ "Kimi K2 and K2.5 (text), Moonlight" → {"Kimi K2", "Kimi K2.5", "Moonlight"}."""
    names, maker = set(), ""
    for name in re.split(r", | and ", re.sub(r" \(text\)|, and later ones of this `model_type`", "", cell)):
        if found := re.match(r"(.*[ -])?[A-Z]\d", name):  # a version, with its maker or of the one before
            maker = found[1] or maker
            name = maker + name.removeprefix(maker)
        names.add(name)
    return names


def test_the_families_that_are_told_of_are_those_that_are_read():
    page = (ROOT / "docs/models.md").read_text()
    told = [row[1].strip("`") for row in rows(page, "Models")]
    assert set(told) == set(FAMILIES)
    refused = {name for row in rows(page, "Refused") for name in re.findall(r"`(\w+)`", row[0])}
    assert refused and not refused & set(FAMILIES)


def test_the_readme_names_the_models_of_every_family_and_no_others():
    by_row = [full_names(row[0]) for row in rows((ROOT / "docs/models.md").read_text(), "Models")]
    (cell,) = re.findall(r"^\| Models \| ([^;]+);", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = full_names(cell)
    assert {"DeepSeek-V3", "DeepSeek-R1", "Kimi K2.5"} <= named <= set().union(*by_row)
    assert [sorted(names) for names in by_row if not names & named] == []


def test_the_commands_page_has_every_option_as_its_help_says():
    assert command_page.PAGE.read_text() == command_page.page(), "write it anew: python tests/helpers/command_page.py"
    assert re.findall(r"^\| `[^|]*\| \|.*", command_page.page(), re.MULTILINE) == [], "an option without help"
    assert re.search(r"^## `isotherm serve`.*?^\| `--port` \| [^|]+", command_page.page(), re.MULTILINE | re.DOTALL)
