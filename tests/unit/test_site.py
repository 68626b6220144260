"""The documentation as a site and as a walk, without what builds and runs them: every page has its
place, every mark means something, notebooks are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.walk import AT_HAND, ELSEWHERE, PAGES, blocks, commands
from docs import site_hooks

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


class Plain(yaml.SafeLoader):
    """Tags of Python objects, which mkdocs allows, are left as they are."""


Plain.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def site() -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=Plain)
    return found


def pages(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    assert isinstance(inner, list) or inner is not None
    return [page for one in inner for page in pages(one)]  # type: ignore[union-attr]


def test_the_navigation_names_every_page_once() -> None:
    there = {
        *(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")),
        *site_hooks.BESIDE.values(),
        *(f"notebooks/{path.stem}.md" for path in NOTEBOOKS),
    }
    named = pages(site()["nav"])
    assert sorted(named) == sorted(there)
    assert all((ROOT / file).is_file() for file in site_hooks.BESIDE)


def test_every_public_name_of_the_reference_is_a_line_that_becomes_its_docstring() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    names = site_hooks.API_LINE.findall(text)
    assert len(names) == text.count("\n- `") > 30
    assert len(set(names)) == len(names)


def test_links_between_files_become_links_between_pages() -> None:
    moved = site_hooks.relinked("[a](../rewards/README.md#judge)", "docs/data.md", "data.md")
    assert moved == "[a](project/rewards.md#judge)"
    moved = site_hooks.relinked("[a](docs/view.md)", "README.md", "project/start.md")
    assert moved == "[a](../view.md)"
    moved = site_hooks.relinked("[a](LICENSE)", "README.md", "project/start.md")
    assert moved == "[a](../files/LICENSE.txt)"
    assert "LICENSE" in site_hooks.linked_files()
    gone = "[a](gone.md) [b](https://example.org/x.md)"
    assert site_hooks.relinked(gone, "docs/data.md", "data.md") == gone


def test_the_walk_knows_every_tutorial() -> None:
    tutorials = {f"docs/tutorials/{path.name}" for path in (ROOT / "docs/tutorials").glob("*.md")}
    assert tutorials | {"README.md"} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_shell_block_of_a_page_is_walked_or_says_why_not(page: str) -> None:
    found = list(blocks(page))  # raises for a mark that is none
    shells = [block for block in found if block.language == "bash"]
    assert shells and all(commands(block.text) for block in shells)
    assert len(found) == len(re.findall(r"^```\w*$", (ROOT / page).read_text(), re.M)) / 2
    for block, before in zip(found[1:], found, strict=False):
        if block.mark == "prints":
            assert before.language == "bash", block.where


def test_no_exception_of_the_walk_is_stale() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [start for start in (*ELSEWHERE, *AT_HAND) if start not in readme] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_whole_and_becomes_a_page(notebook: Path) -> None:
    raw = json.loads(notebook.read_text())
    assert raw["nbformat"] == 4
    page = site_hooks.notebook_page(notebook)
    assert page.startswith("# ") and page.count("```python") > 4
    failed = [out for cell in raw["cells"] for out in cell.get("outputs", ()) if "ename" in out]
    assert failed == []
    assert "/tmp/" not in notebook.read_text() and "/home/" not in notebook.read_text()
